"""Texts that a user hands over to be answered or classified: lines, JSON records, or rows of a CSV file."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from randlora_pl.language.prompt_sets import instruction_prompt
from randlora_pl.language.text_files import TEXTS, csv_rows, decoded, lines_of, read_records, read_text, texts_of
from randlora_pl.utils.errors import UserError

PROMPTS = ("prompt", "instruction", "input")
"""Fields of a decoder's records; an instruction and its input are named as in the commonsense files."""
SENTENCES = tuple(dict.fromkeys(name for names in TEXTS for name in names))
"""Fields of a classifier's records."""
_LINE = "line"


@dataclass(frozen=True)
class Given:
    """One text: its location, and its fields; a plain line is its own only field."""

    where: str
    fields: dict[str, str]


def read_given(source: str, names: Sequence[str]) -> list[Given]:
    """Return the texts of one file in its order; empty lines are left out.

    Args:
        source: A .txt file with a text a line, a .jsonl or .json file of records, a .csv file with a header, or
            ``-`` for standard input, which is read as lines.
        names: The fields to take, `PROMPTS` or `SENTENCES`; the others, such as labels, are left out.

    Raises:
        UserError: It is missing, empty, of another kind, or a line is wrong; the message has file and line.
    """
    path = Path(source)
    if source == "-":
        source = "standard input"
        rows = _plain(lines_of(decoded(sys.stdin.buffer.read(), source)))
    elif not path.is_file():
        what = "is a folder: name its files" if path.is_dir() else "does not exist"
        raise UserError(f"--texts: {path} {what}.")
    elif path.suffix.lower() == ".txt":
        rows = _plain(lines_of(read_text(path)))
    elif path.suffix.lower() in (".jsonl", ".json"):
        rows = read_records(path, (), optional=names)
    elif path.suffix.lower() == ".csv":
        rows = [(line, {name: row[name] for name in names if name in row}) for line, row in csv_rows(path)]
    else:
        raise UserError(
            f"--texts: {path} is not a .txt, .jsonl or .csv file; rename it, or pass its lines with: --texts - < {path}"
        )
    if not rows:
        raise UserError(f"{source} has no text.")
    return [Given(f"{source}, line {line}", fields) for line, fields in rows]


def _plain(lines: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    return [(number, {_LINE: line}) for number, line in enumerate(lines, 1) if line.strip()]


def shown(given: Given) -> str:
    """Return a decoder's text as the user gave it, for the file of answers."""
    fields = given.fields
    asked = fields.get("instruction", fields.get(_LINE, "")) + (f"\n\n{more}" if (more := fields.get("input")) else "")
    return fields.get("prompt", asked)


def prompt_of(given: Given, dataset: str) -> str:
    """Return a decoder's prompt, exactly as in its training.

    A field ``prompt`` is the prompt. An instruction has the template of the commonsense files around it. A plain line
    is an instruction for models of the commonsense files, for E2E a meaning representation (before ``||``), else a
    prompt.

    Args:
        given: The user's text.
        dataset: Training data of the decoder; empty if it is unknown.

    Raises:
        UserError: It has no such field, the field is empty, or the decoder knows no instructions.
    """
    fields, commonsense = given.fields, dataset.startswith("commonsense")
    name = next((name for name in ("prompt", "instruction", _LINE) if name in fields), None)
    if name is None:
        raise UserError(f"{given.where}: 'prompt' is missing.")
    if name == "instruction" and not commonsense:
        raise UserError(
            f"{given.where}: 'instruction' is for models that were trained on the commonsense files, with their "
            "template; give 'prompt'."
        )
    text = fields[name].partition("||")[0].strip() if name == _LINE and dataset == "e2e" else fields[name]
    if not text.strip():
        raise UserError(f"{given.where}: the prompt is empty. Fill it, or delete the record.")
    return instruction_prompt(text, fields.get("input", "")) if commonsense and name != "prompt" else text


def sentences_of(given: Given) -> tuple[str, ...]:
    """Return a classifier's text, or pair of texts; refuse missing and empty ones."""
    texts = texts_of(given.where, given.fields, ((_LINE,), *TEXTS))
    if texts is None:
        raise UserError(f"{given.where}: 'text' (or 'text_a' and 'text_b') is missing.")
    return texts
