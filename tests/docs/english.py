"""What a reader reads: sentences of prose, without code, tables and headings."""

import re

_ENDS = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!\bal)(?<!vs)[.!?][\"')*_]*\s+(?=[\"'(*_`]*[A-Z0-9`\[])")
"""A full stop, and what can begin a sentence behind it."""


def blocks_of(text: str) -> list[str]:
    """Paragraphs and items of lists of a Markdown page, each on one line; what stands between backticks is one word."""
    text = re.sub(r"^ *```.*?^ *``` *$", "\n", text, flags=re.S | re.M)
    text = re.sub(r"`[^`]+`", lambda code: f"`{re.sub(r'[^A-Za-z0-9]+', 'x', code[0])}`", text)
    text = re.sub(r"<!--.*?-->|<[^>]+>", "", text, flags=re.S)
    text = re.sub(r"\$\$.*?\$\$", "\n", text, flags=re.S)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    blocks: list[str] = [""]
    for line in text.splitlines():
        item = re.match(r"\s*([-*]|\d+\.) +", line)
        code = line.startswith("    ") and not item and not blocks[-1]
        if not line.strip() or line.lstrip().startswith(("|", "#", "!!!", "===")) or code:
            blocks.append("")
        elif item:
            blocks.append(line[item.end() :])
        else:
            blocks[-1] += " " + line.strip().lstrip("> ")
    return [" ".join(block.split()) for block in blocks if block.strip()]


def sentences_of(text: str) -> list[str]:
    """The sentences of a Markdown page"""
    found = []
    for block in blocks_of(text):
        found += [part.strip() for part in _ENDS.split(block) if re.search(r"[A-Za-z]{2}", part)]
    return found


def words_of(sentence: str) -> int:
    """The number of words of a sentence."""
    return sum(1 for word in sentence.split() if re.search(r"\w", word))


def help_sentences(page: str) -> list[str]:
    """The sentences of a help page: paragraphs, and the text of each option; examples of commands are left out."""
    blocks = [""]
    for line in page.splitlines():
        option = re.match(r"  (\S.*?)(?:  +|$)(.*)", line)
        if re.match(r"  +(randlora-pl|curl|eval) ", line):
            continue
        if not line.strip() or (option and not line.startswith("   ")):
            blocks.append(option[2] if option else "")
        else:
            blocks[-1] += f" {line.strip()}"
    text = (re.sub(r"(\w+, ){4,}\w+", "names", " ".join(block.split())) for block in blocks)  # of options, of tasks
    parts = (part.strip() for block in text for part in _ENDS.split(block))
    return [part for part in parts if re.search(r"[A-Za-z]{2}", part)]


def comment_sentences(config: str) -> list[str]:
    """The sentences of the comments of a YAML file or script; indented lines are commands."""
    lines = [line for line in config.splitlines() if not re.match(r"#!|#SBATCH|# {3,}", line)]
    head = [line.removeprefix("#").strip() if line.startswith("#") else "" for line in lines]
    beside = [found[1] for line in lines if (found := re.match(r"[^#\n].*? # (.*)", line))]
    return sentences_of("\n".join(head)) + beside
