"""Writes a report: Markdown, CSV, HTML and plots, all of them or none."""

import io
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib import rc_context

from randlora_pl.lab.report.baselines import FILE as BASELINES
from randlora_pl.lab.report.cells import Sweep
from randlora_pl.lab.report.document import Document, Picture, Table
from randlora_pl.lab.report.markdown import markdown
from randlora_pl.lab.report.plan import FILE
from randlora_pl.lab.report.plots import INK
from randlora_pl.lab.report.render import build
from randlora_pl.lab.report.spreadsheets import cells_csv, summary_csv
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import disk_errors, move, scratch_folder

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
