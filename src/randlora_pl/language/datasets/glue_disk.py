"""GLUE as the package ``datasets`` saves it on disk, or as the hub's Parquet files; nothing is asked of the network."""

import re
from collections.abc import Sequence
from pathlib import Path

from randlora_pl.utils.errors import UserError, first_line


def is_saved(folder: Path) -> bool:
    """Return True if a folder is from ``DatasetDict.save_to_disk``, or has files like train-00000-of-00001.parquet."""
    return (folder / "dataset_dict.json").is_file() or any(folder.glob("*-of-*.parquet"))


def missing_split(folder: Path, split: str) -> Path | None:
    """Return the missing part of a split in a folder (see `is_saved`); None if it is complete."""
    if (folder / "dataset_dict.json").is_file():
        state = folder / split / "state.json"
        return None if state.is_file() else state if state.parent.is_dir() else state.parent
    parts = [re.match(r"-(\d+)-of-(\d+)", path.name.removeprefix(split)) for path in folder.glob(f"{split}-*.parquet")]
    numbers = {int(part[1]): int(part[2]) for part in parts if part}
    count = max(numbers.values(), default=1)
    lacking = (number for number in range(count) if number not in numbers)
    return next((folder / f"{split}-{number:05}-of-{count:05}.parquet" for number in lacking), None)


def read_saved(
    folder: Path, split: str, columns: Sequence[str], classes: int
) -> tuple[list[tuple[str, ...]], list[int] | list[float]]:
    """Return the sentences and labels of one split.

    Args:
        folder: See `is_saved`.
        split: Name of the split.
        columns: Columns of the sentences.
        classes: Number of classes, 0 for scores in 0..5.

    Raises:
        UserError: The package is missing, the folder is damaged, a split or column is missing, or a label is wrong.
    """
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as error:
        raise UserError(f'{folder} needs datasets ({error}): pip install ".[hf]" in the checkout') from error
    if lacking := missing_split(folder, split):
        raise UserError(f"{folder} has no whole split {split!r}: {lacking} does not exist. Save or download it again")
    try:
        if (folder / "dataset_dict.json").is_file():
            saved = load_from_disk(str(folder))
        else:
            files = [str(path) for path in sorted(folder.glob(f"{split}-*-of-*.parquet"))]
            saved = {split: Dataset.from_parquet(files)}
    except Exception as error:  # it raises OSError, ValueError, KeyError, pyarrow's and its own errors
        reason = first_line(error.__cause__ or error)
        raise UserError(f"The dataset in {folder} cannot be read ({reason}): save or download it again") from error
    if split not in saved:
        raise UserError(f"{folder} has no split {split!r}: save or download the whole dataset")
    data = saved[split]
    if absent := [name for name in (*columns, "label") if name not in data.column_names]:
        there = ", ".join(data.column_names)
        raise UserError(f"{folder}, split {split!r}: the column {absent[0]!r} is missing (there are {there})")
    labels = list(data["label"])
    kind, expected = (int, f"0 to {classes - 1}") if classes else (int | float, "a score from 0 to 5")
    for row, label in enumerate(labels):
        if not (isinstance(label, kind) and 0 <= label <= (classes - 1 if classes else 5)):
            raise UserError(f"{folder}, split {split!r}, row {row}: the label {label!r} is not {expected}")
    sentences = list(zip(*(data[name] for name in columns), strict=True))
    for row, texts in enumerate(sentences):
        for name, text in zip(columns, texts, strict=True):
            if not isinstance(text, str):
                raise UserError(f"{folder}, split {split!r}, row {row}: {name!r} is not a text but {text!r}")
    return [tuple(map(str.strip, texts)) for texts in sentences], labels if classes else list(map(float, labels))
