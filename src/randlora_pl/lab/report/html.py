"""The report as one HTML page that needs nothing else: styles, script and plots are in it."""

import re
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from randlora_pl.lab.report.document import Document, Picture, Table
from randlora_pl.lab.report.plots import INK


def html(document: Document, drawings: dict[str, str]) -> str:
    """Return the whole page."""
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
