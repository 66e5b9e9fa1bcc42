"""Recommendation of a method for one dataset, and the page that shows it with its reasons and costs."""

import csv
from collections.abc import Mapping
from math import isfinite, sqrt
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib import rc_context
from numpy.typing import NDArray

from randlora_pl.lab.report import (
    Document,
    Picture,
    Section,
    Table,
    TableCell,
    formatted,
    many,
    markdown,
    mean_cell,
    missing_cell,
    row,
)
from randlora_pl.lab.report.accuracy import Beside, elsewhere_table
from randlora_pl.lab.report.cells import Sweep
from randlora_pl.lab.report.comparisons import EQUAL, LEVEL, RULE_ONE
from randlora_pl.lab.report.contest import Advice, Contest, obstacles
from randlora_pl.lab.report.files import cells_csv, draw, how_made, html, missing_tables
from randlora_pl.lab.report.plots import curve_picture, interval_picture, memory_picture
from randlora_pl.lab.report.training import cost_table, logged_runs, rate_table
from randlora_pl.utils.files import disk_errors, write_text
from randlora_pl.utils.text import byte_size


def recommend(sweep: Sweep, margin: float) -> Advice:
    """Recommend a method for the dataset of a sweep.

    It is the simplest one that no other is shown to be better than by possibly more than the margin. This is decided if
    no other method can be better than it by more than the margin, or if it is shown to be better than every other.
    If it is undecided, the simplest one whose mean is within the margin of the best is for today.

    Args:
        sweep: Runs of one model on one dataset with one amount of data.
        margin: Difference in points that does not matter.

    Raises:
        UserError: There are several models, datasets or amounts of data, or no method has a result.
    """
    return Contest(sweep, margin).advice()


PAGE = "index.html"


def write(sweep: Sweep, output: Path, margin: float, commands: Mapping[str, str]) -> Path:
    """Write the recommendation as one page that needs nothing else, its first tables as Markdown, and all cells.

    Args:
        sweep: Runs of one model on one dataset with one amount of data.
        output: Folder of ``index.html``, ``table.md`` and ``cells.csv``; older ones are replaced.
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
    short = [
        Section(one.name, one.title, one.text, one.points, [part for part in one.parts if isinstance(part, Table)])
        for one in document.sections[:2]
    ]
    texts = {PAGE: html(document, drawings), "cells.csv": cells_csv(sweep)}
    texts["table.md"] = markdown(Document(document.title, document.lead, short, []))
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_text(output / name, text)
    return output / PAGE


@rc_context({"text.parse_math": False})  # a dollar sign in a label is one, not a formula
def build(contest: Contest, commands: Mapping[str, str]) -> Document:
    """Return the page of a recommendation."""
    sweep, model, winner, advice = contest.sweep, contest.model, contest.winner, contest.advice()
    spans = {
        other: (pair.difference.mean, *span)
        for other in contest.others(winner)
        if (pair := contest.pairs.get((other, winner))) and (span := contest.span(other, winner))
    }
    logged = {*logged_runs(sweep, model)["method"]}
    curves = curve_picture(sweep, model, [method for method in contest.order if method in logged][:8])
    limits = [
        f"It holds for new pictures of this kind, for the model {model}, and for these sizes of the adapters and this "
        "number of steps. It says nothing about other pictures, models, sizes and numbers of steps.",
        "Simpler is a method that leaves the model as it is, then one with fewer trained parameters. Of numbers within "
        f"a factor of {EQUAL:g}, the faster method is the simpler one.",
        f"The simplest method is recommended that no other is shown to beat by possibly more than {contest.points}. "
        "This is decided if no other can be better by more than that, or if it beats every other. If it is undecided, "
        "the method to take today is the simplest one whose mean is within this margin of the best.",
        RULE_ONE,
    ]
    train = "On all pictures but the test ones, so that the accuracy on these can be checked."
    lines = [line for method in dict.fromkeys((winner, *commands)) if method in commands
             for line in (f"# {method}", commands[method], "")][:-1]  # fmt: skip
    beside, memory = Beside(sweep.plan), memory_picture(sweep, model)
    picture = interval_picture(sweep, winner, spans, contest.margin) if spans else None
    sections = [
        Section("short", "In short", [advice.sentence], advice.details),
        Section("methods", "All methods", parts=[methods_table(contest)]),
        Section("train", "Train it on your data", [train] * bool(lines), commands=lines),
        Section("differences", "Differences", parts=_known(picture)),
        Section("confusion", "Which classes are confused", parts=_known(confusion_table(contest))),
        Section("training", "Training", parts=_known(curves)),
        Section("rates", "Learning rates", parts=_known(rate_table(sweep))),
        Section("cost", "Time and memory", parts=_known(cost_table(sweep, beside, model), memory)),
        Section("elsewhere", "Forgetting", parts=_known(elsewhere_table(sweep, model))),
        Section("missing", "Runs without a result", parts=missing_tables(sweep)),
        Section("unread", "What could not be read", points=sweep.warnings),
        Section("made", "How this was made, and what it does not say", points=[*limits, *how_made(sweep)]),
    ]
    budget = "" if contest.budget == "100%" else f" ({contest.budget})"
    lead = f"{many(len(contest.order), 'trained method')} on {contest.dataset}{budget} with {model}, "
    lead += f"{many(len(sweep.plan.seeds), 'seed')}."
    title = sweep.plan.title or f"Which method for {contest.dataset}?"
    return Document(title, lead, [one for one in sections if one.text or one.points or one.parts], [])


def _known(*parts: Table | Picture | None) -> list[Table | Picture]:
    return [part for part in parts if part]


def methods_table(contest: Contest) -> Table:
    """Return accuracy, verdict and cost of each method, the simplest first, and the pretrained model."""
    sweep, winner = contest.sweep, contest.winner
    own, decided = sweep.estimate(contest.key(winner)), contest.decided
    sizes = sweep.finished.get("adapter_bytes", sweep.finished["fit_seconds"] * float("nan"))
    rows = []
    below = [
        "Accuracies are means over seeds with the 95 % confidence interval over seeds. Differences are in points, "
        "paired by test picture and seed. Below each is its interval. These intervals hold for all methods at once."
    ]
    for method in contest.order:
        pair, span = contest.pairs.get((method, winner)), contest.span(method, winner)
        difference, verdict = TableCell(""), TableCell("no verdict")
        if method == winner:
            verdict = TableCell("take it" if decided else "take it today", best=decided)
        elif pair:
            mean = pair.difference.mean
            between = f"{formatted(span[0])} to {formatted(span[1])}" if span else ""
            difference = TableCell(formatted(mean), between, sort=mean)
        if pair and pair.p is not None:
            verdict.text = "no difference found" if pair.p >= LEVEL else "better" if mean > 0 else "worse"
        elif pair:
            below.append(f"No verdict on {method}: {'; '.join(obstacles(pair))}.")
        of_file, seconds = sizes[sweep.finished["method"] == method].dropna(), contest.seconds(method)
        rows.append(row(
            method,
            verdict,
            mean_cell(sweep.estimate(contest.key(method))),
            difference,
            sweep.parameters(contest.model, method),
            TableCell(f"{seconds:,.1f}", sort=seconds) if isfinite(seconds) else missing_cell("not measured"),
            TableCell(byte_size(fmean(of_file)), sort=fmean(of_file)) if len(of_file) else missing_cell("not kept"),
        ))  # fmt: skip
    zero = sweep.pretrained.get((contest.model, contest.dataset))
    if zero is not None and own:
        untrained = [TableCell(f"{zero:.1f}", sort=zero), TableCell(formatted(zero - own.mean), sort=zero - own.mean)]
        rows.append(row("pretrained model", "not trained", *untrained, 0, "", ""))
    rows += [row(method, missing_cell(why.partition(":")[0]), *[""] * 5) for method, why in contest.failed.items()]
    titles = ["Accuracy, %", f"Difference to {winner}", "Trained parameters", "Seconds per run", "Saved adapter"]
    return Table(
        "methods-all", "Every method, the simplest first", row("Method", "Verdict", *titles), rows, below, left=2
    )


MATRIX = 20
"""Largest number of classes for a whole confusion matrix; of more, as many pairs of classes are shown."""


def confusion_table(contest: Contest) -> Table | None:
    """Return the predicted classes of each true one by the winner, or the most confused pairs; None without records."""
    cells = contest.sweep.select(**contest.key(contest.winner)._asdict())["cell"]
    tables = [table for cell in cells if (table := _confusion(contest.sweep.folder / "cells" / str(cell)))]
    tables = [table for table in tables if table[0] == tables[0][0]]
    if not tables:
        return None
    names, counts = tables[0][0], np.sum([table[1] for table in tables], axis=0)
    of_class = counts.sum(1)
    shares = counts / np.maximum(of_class, 1)[:, None]
    pictures = [int(count) // len(tables) for count in of_class]
    over = f"{contest.winner}, {many(len(tables), 'seed')}"
    if len(names) <= MATRIX:
        rows = [
            row(name, pictures[true], *(_share(share, true == guess) for guess, share in enumerate(shares[true])))
            for true, name in enumerate(names)
        ]
        caption = f"Predicted classes in percent of the test pictures of each class: {over}"
        return Table("confusion-matrix", caption, row("True class", "Pictures", *names), rows)
    wrong = np.where(np.eye(len(names), dtype=bool), 0, counts)
    largest = [divmod(int(place), len(names)) for place in np.argsort(-wrong, axis=None, kind="stable")[:MATRIX]]
    rows = [
        row(names[true], names[guess], pictures[true], _share(shares[true, guess], False))
        for true, guess in largest
        if wrong[true, guess]
    ]
    caption = f"Most frequent confusions in percent of the test pictures of the true class: {over}"
    return Table("confusion-pairs", caption, row("True class", "Predicted", "Pictures", "Percent"), rows, left=2)


def _share(share: float, right: bool) -> TableCell:
    """Return a share as percent: blue where it is right, orange where it is wrong."""
    text = "" if not share else f"{100 * share:.0f}" if share >= 0.005 else "<1"
    return TableCell(text, sort=100 * float(share), tint=float(share) if right else -sqrt(share))


def _confusion(cell: Path) -> tuple[list[str], NDArray[np.int64]] | None:
    """Return class names and counts (true, predicted) of a run; None if its file is missing or damaged."""
    try:
        with (cell / "figures" / "confusion.csv").open(encoding="utf-8", newline="") as stream:
            (_, *names), *rows = csv.reader(stream)
            counts = np.array([[int(count) for count in line[1:]] for line in rows], dtype=np.int64)
    except (OSError, ValueError):
        return None
    return (names, counts) if counts.shape == (len(names), len(names)) else None
