"""Writes a report: Markdown, CSV, HTML and plots, all of them or none."""

import io
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib import rc_context
from pandas import DataFrame

from randlora_pl.lab.report.baselines import FILE as BASELINES
from randlora_pl.lab.report.cells import FINISHED, LABELS, METRIC, RIGHT, Sweep
from randlora_pl.lab.report.curves import TRAINED, VALIDATED
from randlora_pl.lab.report.document import Document, Picture, Printed, Table, markdown
from randlora_pl.lab.report.plan import FILE, Key
from randlora_pl.lab.report.plots import INK
from randlora_pl.lab.report.render import build
from randlora_pl.lab.report.sections.other_tests import AFTER, BEFORE, NEW
from randlora_pl.lab.report.sections.paper_comparison import Beside
from randlora_pl.lab.report.statistics import Estimate
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import disk_errors, move, scratch_folder
from randlora_pl.utils.text.tables import csv_text

_COLUMNS = (
    *("model", "family", "dataset", "budget", "method", "seed", "state", "reason", "accuracy", "zeroshot_accuracy"),
    *("learning_rate", "rate_chosen_by", "adapter", "task", "trainable_parameters", "total_parameters", "fit_seconds"),
    *("images_per_second", "samples_per_second", "peak_memory_bytes", "device", "steps", "version", "git_commit"),
)
_MACHINE = (METRIC, "machine", "cpu_threads", "version/python", "version/torch", TRAINED, VALIDATED)
"""Further columns, where any run has them."""
SPECTRUM = "spectrum/"
AVERAGE = "(average)"
"""Entry in place of the dataset for averages."""


def cells_csv(sweep: Sweep) -> str:
    """Return a line for every run, with or without a result; accuracies in percent."""
    known = [name for name, column in sweep.finished.items() if column.notna().any()]
    more = [*_MACHINE, *[RIGHT] * (len(sweep.plan.datasets) == 1)]  # tests of one dataset are paired by sample
    further = sorted(name for name in known if name.startswith((SPECTRUM, BEFORE, AFTER, NEW)))
    tests = list(dict.fromkeys(name for names in sweep.tests.values() for name in names))
    columns = [*_COLUMNS, *(name for name in more if name in known), *further, *tests, "cell"]
    cells = sweep.cells.assign(**{name: 100 * sweep.cells[name] for name in tests})
    return _csv(cells[[name for name in columns if name != f"{SPECTRUM}steps"]])


def summary_csv(sweep: Sweep) -> str:
    """Return a line for every cell, and for every average over datasets; accuracies in percent.

    ``ci95`` is half of the confidence interval of the mean. An empty field has no number, and ``state`` has the reason.
    """
    apart = sweep.by_test()
    beside = Beside(sweep.plan)
    rows: list[tuple[object, ...]] = []
    for key, runs in apart.runs.items():
        estimate, counts = apart.estimate(key), (len(apart.by_seed(key)), len(runs))
        state = FINISHED if estimate else apart.why_missing(key)
        size = apart.parameters(key.model, key.method)
        rows.append((*key, "", *counts, *_numbers(estimate, beside.cell(key)), size, state))
    for model in sweep.plan.models:
        for budget in apart.budgets(model):
            shared = apart.common(model, budget)[0]
            for method in apart.methods(model, budget):
                if average := apart.average(model, budget, method, shared):
                    labels = (*Key(model, AVERAGE, budget, method), " ".join(shared))
                    counts = len(average.seeds), len(average.all_seeds)
                    numbers = _numbers(average.estimate, beside.average(model, budget, method, shared))
                    rows.append((*labels, *counts, *numbers, apart.parameters(model, method), FINISHED))
    measured = ["datasets", "seeds", "seeds_planned", "mean", "std", "ci95", "paper", "difference"]
    return _csv(DataFrame(rows, columns=[*LABELS, *measured, "trainable_parameters", "state"]))


def _numbers(estimate: Estimate | None, paper: Printed | None) -> tuple[float | None, ...]:
    printed = paper.value if paper else None
    if estimate is None:
        return None, None, None, printed, None
    return estimate.mean, estimate.std, estimate.half, printed, None if printed is None else estimate.mean - printed


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
    content = _content(sweep)
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


def _content(sweep: Sweep) -> dict[str, bytes]:
    document = build(sweep)
    pictures = [part for section in document.sections for part in section.parts if isinstance(part, Picture)]
    drawings = {picture.name: draw(picture.figure, "svg", picture.name) for picture in pictures}
    texts = {
        "index.html": html(document, {name: data.decode("utf-8") for name, data in drawings.items()}),
        "report.md": markdown(document, PLOTS),
        "cells.csv": cells_csv(sweep),
        "summary.csv": summary_csv(sweep),
    }
    content = {name: text.encode("utf-8") for name, text in texts.items()}
    for name in _SOURCES:  # with the cells all that a report is made from
        if (sweep.folder / name).is_file():
            content[name] = (sweep.folder / name).read_bytes()
    for picture in pictures:
        content[f"{PLOTS}/{picture.name}.png"] = draw(picture.figure, "png", picture.name)
        content[f"{PLOTS}/{picture.name}.svg"] = drawings[picture.name]
    return content


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
    inline = {
        part.name: inline_svg(drawings[part.name], part)
        for section in document.sections
        for part in section.parts
        if isinstance(part, Picture)
    }
    return environment.from_string(template).render(document=document, drawings=inline) + "\n"


def inline_svg(text: str, picture: Picture) -> str:
    """Return an SVG file as part of a page: it scales, takes the page's colour of words, and is described."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = svg.replace(INK, "currentColor")
    # the identifiers of several drawings in one page must differ
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{picture.name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{picture.name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{picture.name}-\1)", svg)
    head, _, rest = svg.partition(">")
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-labelledby="{picture.name}-described">{rest}'
