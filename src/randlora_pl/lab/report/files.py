"""The document of a report, and its files: Markdown, CSV, HTML and plots, all of them or none."""

import io
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib import rc_context
from pandas import DataFrame, Series

from randlora_pl.lab.paper import SOURCE, cells
from randlora_pl.lab.report import Document, Estimate, Picture, Printed, Section, Table, accuracy, many, markdown, row
from randlora_pl.lab.report.accuracy import RELATIVE, Beside, of_data_sets
from randlora_pl.lab.report.cells import BASELINES, FILE, FINISHED, LABELS, METRIC, RIGHT, Key, Sweep
from randlora_pl.lab.report.collect import TRAINED, VALIDATED
from randlora_pl.lab.report.comparisons import comparisons, conclusion, matrix_table, references, versus_table
from randlora_pl.lab.report.plots import INK, curve_pictures, difference_picture, memory_picture, parameter_picture
from randlora_pl.lab.report.training import cost_table, partial_table, rate_table, training_table
from randlora_pl.sweep import HEAD, is_zero_shot
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import disk_errors, move, scratch_folder
from randlora_pl.utils.text import csv_text


@rc_context({"text.parse_math": False})  # a dollar sign in a label is one, not a formula
def build(sweep: Sweep) -> Document:
    """Return the report of a sweep: what it shows in short, tables, plots, what is missing, footnotes."""
    apart, beside = sweep.by_test(), Beside(sweep.plan)
    models = [model for model in sweep.plan.models if len(sweep.select(model=model))]
    versus = comparisons(apart)
    compared = references(apart, versus)
    averages = [accuracy.average_table(apart, beside, model) for model in models]
    tables = [accuracy.accuracy_table(apart, beside, model) for model in models]
    costs, transfers, halves = (
        [table for model in models if (table := make(sweep, beside, model))]
        for make in (cost_table, accuracy.transfer_table, accuracy.new_classes_table)
    )
    for table in (*averages, *tables, *costs, *transfers, *halves):
        beside.annotate(table)
    differences: list[Table | Picture] = []
    for here in compared:
        differences += [matrix_table(apart, here), difference_picture(apart, beside, here)]
    trained: list[Table | Picture] = []
    for model in models:
        if table := training_table(sweep, model):
            trained += [table, *curve_pictures(sweep, model)]
    families: dict[str, list[str]] = {}
    for model in models:
        families.setdefault(apart.family(model), []).append(model)
    pictures = [parameter_picture(apart, family, names) for family, names in families.items()]
    pictures += [memory_picture(apart, model) for model in models]
    pairs = [versus_table(versus) if versus else None, partial_table(apart)]
    shown, *more = [*conclusion(apart, versus, compared), *_counts(sweep, apart)]
    commands = [
        "# in the folder of this report: regenerate it from cells.csv, or repeat the runs",
        "randlora-pl report . --output again",
        f"randlora-pl sweep {FILE}",
    ]
    sections = [
        Section("short", "In short", [shown], [*sweep.plan.notes, *more]),
        Section("differences", "Difference to a reference", parts=differences),
        Section("averages", "Averages", _about_paper(beside, sweep), [], [*averages]),
        Section("cells", "Every dataset", _reading(apart), [], [*tables]),
        Section("new", "New classes", parts=[*halves]),
        Section("transfer", "Other datasets", parts=[*transfers]),
        Section("versus", "Method against method", parts=[*filter(None, pairs)]),
        Section("training", "Training loss", parts=trained),
        Section("rates", "Learning rates", parts=[*filter(None, [rate_table(sweep)])]),
        Section("cost", "Parameters, time and memory", parts=[*costs, *filter(None, pictures)]),
        Section("elsewhere", "Forgetting", parts=[*filter(None, (accuracy.elsewhere_table(sweep, m) for m in models))]),
        Section("missing", "Runs without a result", parts=missing_tables(sweep)),
        Section("unread", "What could not be read", points=[*sweep.warnings, *beside.problems]),
        Section("made", "How this was made", points=how_made(sweep), commands=commands),
    ]
    names: Counter[str] = Counter()
    for part in (part for section in sections for part in section.parts):
        names[part.name] += 1  # equal files and anchors come from labels that differ in punctuation only
        if names[part.name] > 1:
            part.name += f"-{names[part.name]}"
    lead = f"A sweep of {many(len(models), 'model')}, {many(len(sweep.plan.datasets), 'dataset')}, "
    lead += f"{many(len(sweep.plan.methods), 'method')} and {many(len(sweep.plan.seeds), 'seed')}."
    return Document(
        sweep.plan.title or sweep.folder.resolve().name,
        lead,
        [section for section in sections if section.text or section.points or section.parts],
        beside.footnotes,
    )


def _counts(sweep: Sweep, apart: Sweep) -> list[str]:
    """Return how many runs finished, and which cells do not differ from the pretrained model."""
    states = Counter(sweep.cells["state"])
    rest = "".join(f", {count} {state}" for state, count in states.items() if state != FINISHED)
    lines = [f"{states[FINISHED]} of {many(len(sweep.cells), 'run')} finished{rest}."]
    if len(sweep.plan.seeds) < 2:
        lines.append("One seed gives no confidence intervals, and small differences mean nothing.")
    cells = [key for key in apart.accuracies if not is_zero_shot(key.method)]
    if idle := Counter(key.method for key in cells if apart.idle(key)):
        who = ", ".join(f"{method} ({count})" for method, count in idle.items())
        trained = many(len(cells), "trained cell")
        lines.append(f"{idle.total()} of {trained}: {accuracy.IDLE}, according to their intervals: {who}.")
    return lines


def _about_paper(beside: Beside, sweep: Sweep) -> list[str]:
    plan = beside.plan
    if not plan.tables and plan.figure is None:
        return []
    if not beside.tables:
        return [f"The paper gives Figure {plan.figure} as a drawing only, without numbers to compare with."]
    figure = f", which Figure {plan.figure} draws" if plan.figure else ""
    own = [number for number in beside.tables if not any(cell.source for cell in cells(number))]
    lines = []
    if own:
        tables = f"Table{'s' * (len(own) > 1)} {', '.join(own)}"
        lines.append(
            f"Below each of our values is the paper's value and the difference, ours minus the paper's: "
            f"{tables} of {SOURCE}{figure}."
        )
    if any(map(of_data_sets, own)):
        lines.append(
            "Below each of our averages is the mean of the paper's cells over the same datasets. It is missing if "
            "the paper lacks one of them or has no such method."
        )
    if len(own) < len(beside.tables):
        lines.append(
            'Below our values is what other papers published and the difference, ours minus theirs: "published". '
            "A note at each method names the source. An average is compared with the mean of published values over the "
            "same datasets, or with a printed average over them."
        )
    for number in own:
        if number == RELATIVE:
            lines.append(f"Table {RELATIVE} has no accuracies: its values are in the table of times and memory.")
        elif not of_data_sets(number):
            texts = (sweep.finished["base/library"] == "transformers").any()
            every, all_of_them = ("eight tests", "eight") if texts else ("22 datasets", "22")
            lines.append(
                f"Table {number} has averages over all {every} only, so they are compared only with our averages "
                f"over all {all_of_them}."
            )
    return [" ".join(lines)]


def _reading(sweep: Sweep) -> list[str]:
    plan = sweep.plan
    seeds = f"Seed{'s' * (len(plan.seeds) > 1)} {', '.join(map(str, plan.seeds))}"
    mark = (
        f'A cell is marked "{accuracy.IDLE}" if its interval contains the accuracy of the pretrained model.'
        if sweep.pretrained
        else "The accuracy of the pretrained model was not measured."
    )
    return [
        f"{seeds}. Intervals are Student's t over seeds: they show how much the seeds differ, not the datasets. "
        "A value without an interval is from one seed. No value is marked as the best: the tests below compare "
        f"methods. {mark} A cell without a finished run shows the reason."
    ]


def how_made(sweep: Sweep) -> list[str]:
    """Return device, machine and versions, as far as the runs know them, and the command that chose the rates."""
    facts = []
    columns = {"device": "device", "machine": "machine", "CPU threads": "cpu_threads", "randlora-pl": "version"}
    columns |= {"commit": "git_commit", "PyTorch": "version/torch", "Python": "version/python"}
    for name, column in columns.items():
        known = sweep.finished.get(column, Series(dtype=object)).dropna().convert_dtypes()
        texts = sorted({str(value)[: 10 if name == "commit" else None] for value in known if value})
        facts += [f"{name} {', '.join(texts)}"] if texts else []
    lines = [f"The runs: {'; '.join(facts)}."] if facts else []
    if command := sweep.plan.tuned.get("command"):
        lines.append(f"The learning rates: {command}")
    return lines


def missing_tables(sweep: Sweep) -> list[Table | Picture]:
    """Return every run without a result; runs of one cell with the same reason share a row."""
    missing = sweep.cells[sweep.cells["accuracy"].isna()]
    rows = []
    for (model, dataset, budget, method, status), runs in missing.groupby([*LABELS, "status"], sort=False):
        seeds = ", ".join(map(str, runs["seed"].dropna()))
        folders = ", ".join(filter(None, runs["cell"]))
        rows.append(row(method, budget, dataset, model, seeds, status, folders))
    header = row("Method", "Data", "Dataset", "Model", "Seeds", "State", "Folder in cells/")
    caption = f"{many(len(missing), 'run')} without a result"
    return [Table("missing-runs", caption, header, rows, left=len(header))] if rows else []


def cells_csv(sweep: Sweep) -> str:
    """Return a line for every run, with or without a result; accuracies in percent."""
    known = [name for name, column in sweep.finished.items() if column.notna().any()]
    always = [
        *("model", "family", "dataset", "budget", "method", "seed", "state", "reason", "accuracy"),
        *("zeroshot_accuracy", "learning_rate", "rate_chosen_by", "adapter", "task", "trainable_parameters"),
        *("total_parameters", "fit_seconds", "images_per_second", "samples_per_second", "peak_memory_bytes"),
        *("device", "steps", "version", "git_commit"),
    ]
    more = [HEAD, METRIC, "machine", "cpu_threads", "version/python", "version/torch", TRAINED, VALIDATED]
    more += [RIGHT] * (len(sweep.plan.datasets) == 1)  # tests of one dataset are paired by sample
    prefixes = ("spectrum/", accuracy.BEFORE, accuracy.AFTER, accuracy.NEW)
    further = sorted(name for name in known if name.startswith(prefixes))
    tests = list(dict.fromkeys(name for names in sweep.tests.values() for name in names))
    columns = [*always, *(name for name in more if name in known), *further, *tests, "cell"]
    cells = sweep.cells.assign(**{name: 100 * sweep.cells[name] for name in tests})
    return _csv(cells[[name for name in columns if name != "spectrum/steps"]])


def summary_csv(sweep: Sweep) -> str:
    """Return a line for every cell, and for every average over datasets; accuracies in percent.

    ``ci95`` is half of the confidence interval of the mean. An empty field has no number, and ``state`` has the reason.
    """
    apart = sweep.by_test()
    beside = Beside(sweep.plan)
    rows: list[tuple[object, ...]] = []

    def add(key: Key, over: str, counts: tuple[int, int], estimate: Estimate | None, paper: Printed | None) -> None:
        numbers = (estimate.mean, estimate.std, estimate.half) if estimate else (None, None, None)
        printed = paper.value if paper else None
        difference = None if estimate is None or printed is None else estimate.mean - printed
        state = FINISHED if estimate else apart.why_missing(key)
        size = apart.parameters(key.model, key.method)
        rows.append((*key, over, *counts, *numbers, printed, difference, size, state))

    for key, runs in apart.runs.items():
        add(key, "", (len(apart.by_seed(key)), len(runs)), apart.estimate(key), beside.cell(key))
    for model in sweep.plan.models:
        for budget in apart.budgets(model):
            shared = apart.common(model, budget)[0]
            for method in apart.methods(model, budget):
                if average := apart.average(model, budget, method, shared):
                    key, counts = Key(model, "(average)", budget, method), (len(average.seeds), len(average.all_seeds))
                    paper = beside.average(model, budget, method, shared)
                    add(key, " ".join(shared), counts, average.estimate, paper)
    measured = ["datasets", "seeds", "seeds_planned", "mean", "std", "ci95", "paper", "difference"]
    return _csv(DataFrame(rows, columns=[*LABELS, *measured, "trainable_parameters", "state"]))


def _csv(table: DataFrame) -> str:
    """Return a table as CSV text: whole numbers as they are, others with six digits, nothing for a missing one."""
    values = table.convert_dtypes().astype(object)
    rows = values.where(values.notna(), None).to_numpy().tolist()
    return csv_text([list(table), *([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)])


PLOTS = "figures"
_SOURCES = (FILE, BASELINES)
"""Files of a sweep that its report has, too, if the sweep has them."""


def write_report(sweep: Sweep, output: Path, overwrite: bool = False) -> list[Path]:
    """Write the files of a report. Other files in its folder are left alone, except the sources of a report before.

    Returns:
        The files: ``index.html`` first, the plots last.

    Raises:
        UserError: There is a report or something else, or it cannot be written.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; give a folder: --output DIR")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(
            f"{output} exists and is not empty; give another --output, or --overwrite to replace the report in it."
        )
    document = build(sweep)
    pictures = [part for section in document.sections for part in section.parts if isinstance(part, Picture)]
    drawings = {picture.name: draw(picture.figure, "svg", picture.name) for picture in pictures}
    texts = {"index.html": html(document, {name: data.decode("utf-8") for name, data in drawings.items()})}
    texts |= {"report.md": markdown(document, PLOTS), "cells.csv": cells_csv(sweep), "summary.csv": summary_csv(sweep)}
    content = {name: text.encode("utf-8") for name, text in texts.items()}
    for name in _SOURCES:  # with the cells all that a report is made from
        if (sweep.folder / name).is_file():
            content[name] = (sweep.folder / name).read_bytes()
    for picture in pictures:
        content[f"{PLOTS}/{picture.name}.png"] = draw(picture.figure, "png", picture.name)
        content[f"{PLOTS}/{picture.name}.svg"] = drawings[picture.name]
    with disk_errors(output), scratch_folder(output / "report") as part:
        (output / PLOTS).mkdir(exist_ok=True)
        for number, data in enumerate(content.values()):
            (part / str(number)).write_bytes(data)
        for kind in ("curves", "differences", "memory", "parameters"):
            for old in (output / PLOTS).glob(f"{kind}-*"):
                old.unlink()
        for name in _SOURCES:  # of the report before, which would be read with these cells
            if name not in content:
                (output / name).unlink(missing_ok=True)
        for number, name in enumerate(content):
            move(part / str(number), output / name)
    return [output / name for name in content]


def draw(figure: Any, form: str, name: str) -> bytes:
    """Return a figure as a PNG file (on white) or an SVG file (without a background).

    The same figure gives the same bytes: the name is the seed of the identifiers in an SVG file.
    """
    stream = io.BytesIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "path", "text.parse_math": False}):
        metadata = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(stream, format=form, dpi=144, metadata=metadata, transparent=form == "svg")
    return stream.getvalue()


def html(document: Document, drawings: dict[str, str]) -> str:
    """Return the report as one page that needs nothing else: styles, script and plots are in it."""
    template = (files(__package__) / "template.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.tests["table"] = lambda part: isinstance(part, Table)
    inline = {}
    for name, text in drawings.items():  # they scale, take the page's colour of words, and are described
        svg = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
        # the identifiers of several drawings in one page must differ
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg.replace(INK, "currentColor"))
        head, _, rest = svg.partition(">")
        head = re.sub(r'\s(width|height)="[^"]*"', "", head)
        inline[name] = f'{head} role="img" aria-labelledby="{name}-described">{rest}'
    return environment.from_string(template).render(document=document, drawings=inline) + "\n"
