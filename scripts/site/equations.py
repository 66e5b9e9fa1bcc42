"""Hook of MkDocs: equations between dollar signs as MathML, which browsers draw without a program or a network.

GitHub reads the same notation. ``pymdownx.arithmatex`` finds the equations and leaves their LaTeX in the page.
"""

import html
import re

from latex2mathml.converter import convert

_FOUND = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(body: str, **_: object) -> str:
    """Replace the LaTeX of a page's HTML."""
    return _FOUND.sub(_mathml, body)


def _mathml(found: re.Match[str]) -> str:
    tag, bracket, latex = found.groups()
    latex, *number = re.split(r"\\tag\{(.*?)\}", html.unescape(latex).strip())
    equation = convert(latex.strip(), display="block" if bracket == "[" else "inline")
    label = f"<span>({number[0]})</span>" if number else ""
    return f'<{tag} class="equation">{equation}{label}</{tag}>'
