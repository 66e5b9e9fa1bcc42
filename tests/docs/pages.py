"""What the pages say: their text, commands, links and headings."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [
        *sorted(DOCS.glob("*.md")),
        *sorted(DOCS.glob("methods/*.md")),
        *sorted(DOCS.glob("results/*.md")),
        *sorted(DOCS.glob("api/*.md")),
        *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY", "CODE_OF_CONDUCT")),
    ]
}

(DIGITS,) = re.findall(r"<<'END'\n(.*?)END\n", PAGES["docs/first_classifier.md"], flags=re.S)
"""The code that writes images of digits."""

RESULTS = [path.parent.name for path in sorted(DOCS.glob("results/*/index.html"))]
"""Folders of committed reports."""

MADE = {"command_options", "config_keys", "datasets", "models", "changelog", "contributing"}
"""Pages of the site that scripts/site/generated.py makes."""


def joined(block: str) -> list[str]:
    """The commands of a block of shell, those with ``\\`` at the end of a line in one."""
    return re.sub(r"\s*\\\n\s*", " ", block).splitlines()


def commands_of(text: str) -> list[list[str]]:
    """The words behind ``randlora-pl`` of every command: in blocks, on indented lines, and between backticks."""
    lines = [line for body in re.findall(r"```sh\n(.*?)```", text, flags=re.S) for line in joined(body)]
    lines += re.findall(r"^ {4}(\S.*)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    found = [
        line[line.index("randlora-pl ") :] for line in lines if re.match(r"(\S+/|.* && \S*)?randlora-pl [a-z]", line)
    ]
    found += [" ".join(words.split()) for words in re.findall(r"`(randlora-pl [a-z][^`]*)`", text)]
    return [shlex.split(re.split(r"\s{2,}|\s#", command)[0])[1:] for command in found]


def prose_of(text: str) -> str:
    """A page without its blocks of code, and without code between backticks."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.S))


def links_of(text: str) -> list[str]:
    """Where the links and pictures of a page lead."""
    return re.findall(r"\]\(([^)\s]+)\)", prose_of(text))


def anchors_of(text: str) -> set[str]:
    """The anchors of a page's headings, as both MkDocs and GitHub name them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def shown(text: str) -> list[tuple[str, str]]:
    """Each command that stands alone in its block, with the output below it."""
    blocks = re.findall(r"```sh\n(randlora-pl [^`]+)\n```\n\n```text\n(.*?)```", text, flags=re.S)
    commands = [(joined(block), output) for block, output in blocks]
    return [(lines[0].removeprefix("randlora-pl "), output) for lines, output in commands if len(lines) == 1]
