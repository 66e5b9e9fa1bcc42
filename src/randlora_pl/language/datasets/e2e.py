"""The E2E challenge as text: one line ``meaning representation || reference`` for each reference (paper: B.2)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from randlora_pl.language.datasets.text_files import first_file, read_lines
from randlora_pl.utils.errors import UserError

Split = Literal["train", "validation", "test"]

TREE = "train.txt, valid.txt and test.txt with lines 'meaning representation || reference'"
SOURCE = (
    "https://github.com/tuetschek/e2e-dataset, its tables written as such lines, "
    "or examples/NLG/data/e2e of https://github.com/microsoft/LoRA"
)


def read_e2e(root: Path, split: Split) -> list[tuple[str, str]]:
    """Return the lines of one split in their order; empty lines are left out.

    A line is a meaning representation, such as ``name : Aromi | type : pub``, and a person's text for it.

    Raises:
        UserError: The file is missing (with expected tree and source) or a line is wrong (file and line).
    """
    path = first_file(root, ("valid.txt" if split == "validation" else f"{split}.txt",), TREE, SOURCE)
    found: list[tuple[str, str]] = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        parts = [part.strip() for part in line.split("||")]
        if len(parts) != 2 or not all(parts):
            what = f"expected 'meaning representation || reference' with one '||', not {line.strip()[:60]!r}"
            raise UserError(f"{path}, line {number}: {what}. Correct the line, or download the file again")
        found.append((parts[0], parts[1]))
    if not found:
        raise UserError(f"{path} has no lines. Download the file again")
    return found


def grouped(lines: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the references of each meaning representation, wherever their lines are, in the order of the first."""
    groups: dict[str, list[str]] = {}
    for meaning, reference in lines:
        groups.setdefault(meaning, []).append(reference)
    return groups
