"""Recommendation of a method for one dataset, and the page that shows it with its reasons and costs."""

import csv
from collections.abc import Mapping
from math import sqrt
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from numpy.typing import NDArray

from randlora_pl.lab.report import Document, Picture, Section, Table, TableCell, formatted, many, missing_cell, row
from randlora_pl.lab.report.accuracy import Beside, elsewhere_table
from randlora_pl.lab.report.cells import Sweep
from randlora_pl.lab.report.comparisons import RULE_ONE
from randlora_pl.lab.report.contest import Contest
from randlora_pl.lab.report.files import cells_csv, draw, how_made, html, missing_tables
from randlora_pl.lab.report.plots import curve_picture, memory_picture
from randlora_pl.lab.report.training import cost_table, logged_runs, rate_table
from randlora_pl.utils.files import disk_errors, write_text


def recommend(sweep: Sweep, margin: float) -> Contest:
    """Recommend a method for the dataset of a sweep.

    Args:
        sweep: Runs of one model on one dataset with one amount of data.
        margin: Difference in points that does not matter.

    Raises:
        UserError: There are several models, datasets or amounts of data, or no method has a result.
    """
    return Contest(sweep, margin)


PAGE = "index.html"


def write(sweep: Sweep, output: Path, margin: float, commands: Mapping[str, str]) -> Path:
    """Write the recommendation as one page that needs nothing else, and all cells.

    Args:
        sweep: Runs of one model on one dataset with one amount of data.
        output: Folder of ``index.html`` and ``cells.csv``; older ones are replaced.
        margin: Difference in points that does not matter.
        commands: Command that trains each method on all data, by label.

    Returns:
        The page.

    Raises:
        UserError: There are several models, datasets or amounts of data, no method has a result, or the files cannot
            be written.
    """
    document = build(Contest(sweep, margin), commands)
    pictures = [part for section in document.sections for part in section.parts if isinstance(part, Picture)]
    drawings = {picture.name: draw(picture.figure, "svg", picture.name).decode("utf-8") for picture in pictures}
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / PAGE, html(document, drawings))
        write_text(output / "cells.csv", cells_csv(sweep))
    return output / PAGE


@rc_context({"text.parse_math": False})  # a dollar sign in a label is one, not a formula
def build(contest: Contest, commands: Mapping[str, str]) -> Document:
    """Return the page of a recommendation."""
    sweep, model = contest.sweep, contest.model
    logged = {*logged_runs(sweep, model)["method"]}
    curves = curve_picture(sweep, model, [method for method in contest.order if method in logged][:8])
    costs = cost_table(sweep, Beside(sweep.plan), model), memory_picture(sweep, model)
    limits = [
        f"It holds for new pictures of this kind, the model {model}, these sizes of adapters and this number of steps.",
        "Simpler is a method that leaves the model as it is, then one with fewer trained parameters. Of about equally "
        "many, the faster method is the simpler one.",
        f"The simplest method is recommended that no other is shown to beat by possibly more than {contest.margin:g} "
        "(--margin). This is decided if no other can be better by more than that. If it is undecided, the method to "
        "take today is the simplest one whose mean is within this margin of the best. More test pictures and more "
        "seeds make intervals narrower.",
        f"{RULE_ONE} On this page, its interval for all methods at once must exclude zero, too.",
    ]
    train = "On all pictures but the test ones, so that the accuracy on these can be checked."
    lines = []
    for method in dict.fromkeys((contest.winner, *commands)):
        if method in commands:
            lines += [f"# {method}", commands[method], ""]
    sections = [
        Section("short", "In short", [contest.sentence], contest.details),
        Section("methods", "All methods", parts=[methods_table(contest)]),
        Section("train", "Train it on your data", [train] * bool(lines), commands=lines[:-1]),
        Section("confusion", "Which classes are confused", parts=[*filter(None, [confusion_table(contest)])]),
        Section("training", "Training", parts=[*filter(None, [curves])]),
        Section("rates", "Learning rates", parts=[*filter(None, [rate_table(sweep)])]),
        Section("cost", "Time and memory", parts=[part for part in costs if part]),
        Section("elsewhere", "Forgetting", parts=[*filter(None, [elsewhere_table(sweep, model)])]),
        Section("missing", "Runs without a result", parts=missing_tables(sweep)),
        Section("unread", "What could not be read", points=sweep.warnings),
        Section("made", "How this was made, and what it does not say", points=[*limits, *how_made(sweep)]),
    ]
    budget = "" if contest.budget == "100%" else f" ({contest.budget})"
    lead = f"{many(len(contest.order), 'trained method')} on {contest.dataset}{budget} with {model}, "
    lead += f"{many(len(sweep.plan.seeds), 'seed')}."
    title = sweep.plan.title or f"Which method for {contest.dataset}?"
    return Document(title, lead, [one for one in sections if one.text or one.points or one.parts], [])


def methods_table(contest: Contest) -> Table:
    """Return accuracy, difference and verdict of each method, the simplest first, and the pretrained model."""
    sweep, winner, rows = contest.sweep, contest.winner, []
    below = [
        "Accuracies are means over seeds. Differences are in points, paired by test picture and seed. Below each are "
        "the ends of its 95 % confidence interval. The intervals of differences hold for all methods at once."
    ]
    for method in contest.order:
        pair, span = contest.pairs.get((method, winner)), contest.span(method, winner)
        difference, verdict = TableCell(""), TableCell("no verdict")
        if method == winner:
            verdict = TableCell("take it" if contest.decided else "take it today", best=contest.decided)
        elif pair:
            mean = pair.difference.mean
            difference = TableCell(formatted(mean), " to ".join(map(formatted, span or ())), sort=mean)
            differs = contest.better(method, winner) or contest.better(winner, method)
            if pair.p is None:
                verdict.text = "not tuned" if pair.untuned else "no verdict"
                below.append(f"{method}: {pair.obstacle}.")
            else:
                verdict.text = "no difference found" if not differs else "better" if mean > 0 else "worse"
        mean, (low, high) = contest.estimates[method].mean, contest.interval(method)
        accuracy = TableCell(f"{mean:.1f}", f"{low:.1f} to {high:.1f}", sort=mean)
        rows.append(row(method, verdict, accuracy, difference, sweep.parameters(contest.model, method)))
    zero = sweep.pretrained.get((contest.model, contest.dataset))
    if zero is not None:
        gain = zero - contest.estimates[winner].mean
        cells = TableCell(f"{zero:.1f}", sort=zero), TableCell(formatted(gain), sort=gain)
        rows.append(row("pretrained model", "not trained", *cells, 0))
    rows += [row(method, missing_cell(why.partition(":")[0]), "", "", "") for method, why in contest.failed.items()]
    header = row("Method", "Verdict", "Accuracy, %", f"Difference to {winner}", "Trained parameters")
    return Table("methods-all", "Every method, the simplest first", header, rows, below, left=2)


MATRIX = 20
"""Largest number of classes for a whole confusion matrix; of more, as many pairs of classes are shown."""


def confusion_table(contest: Contest) -> Table | None:
    """Return the predicted classes of each true one by the winner, or the most confused pairs; None without records."""
    runs = contest.sweep.select(**contest.key(contest.winner)._asdict())["cell"]
    tables = [table for cell in runs if (table := _counts(contest.sweep.folder / "cells" / str(cell)))]
    tables = [table for table in tables if table[0] == tables[0][0]]
    if not tables:
        return None
    names, counts = tables[0][0], np.sum([table[1] for table in tables], axis=0)
    shares = counts / np.maximum(counts.sum(1), 1)[:, None]
    pictures = [int(count) // len(tables) for count in counts.sum(1)]

    def percent(true: int, guess: int) -> TableCell:
        share = float(shares[true, guess])
        text = "" if not share else f"{100 * share:.0f}" if share >= 0.005 else "<1"
        return TableCell(text, sort=100 * share, tint=share if true == guess else -sqrt(share))

    over = f"of the test pictures of each true class: {contest.winner}, {many(len(tables), 'seed')}"
    if len(names) <= MATRIX:
        places = range(len(names))
        rows = [row(names[true], pictures[true], *(percent(true, guess) for guess in places)) for true in places]
        return Table(
            "confusion-matrix", f"Predicted classes in percent {over}", row("True class", "Pictures", *names), rows
        )
    np.fill_diagonal(counts, 0)
    largest = [divmod(int(place), len(names)) for place in np.argsort(-counts, axis=None, kind="stable")[:MATRIX]]
    wrong = [(true, guess) for true, guess in largest if counts[true, guess]]
    rows = [row(names[true], names[guess], pictures[true], percent(true, guess)) for true, guess in wrong]
    header = row("True class", "Predicted", "Pictures", "Percent")
    return Table("confusion-pairs", f"Most frequent confusions in percent {over}", header, rows, left=2)


def _counts(cell: Path) -> tuple[list[str], NDArray[np.int64]] | None:
    """Return class names and counts (true, predicted) of a run; None if its file is missing or damaged."""
    try:
        with (cell / "figures" / "confusion.csv").open(encoding="utf-8", newline="") as stream:
            (_, *names), *rows = csv.reader(stream)
            counts = np.array([[int(count) for count in line[1:]] for line in rows], dtype=np.int64)
    except (OSError, ValueError, csv.Error):
        return None
    return (names, counts) if counts.shape == (len(names), len(names)) else None
