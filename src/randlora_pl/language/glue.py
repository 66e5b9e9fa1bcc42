r"""The six GLUE tasks of the paper (Table 4) from GLUE's TSV folders, or from ``datasets`` saved on disk.

The TSV files quote nothing: a field may hold any number of ``"``, so they are split at tabs alone. They differ in their
columns, and CoLA's have no header but in the test file. Nothing is asked of the network.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from randlora_pl.language.text_files import Examples, lines_of, numeric, read_text
from randlora_pl.utils.errors import UserError


def is_saved(folder: Path) -> bool:
    """Return True if a folder is from ``DatasetDict.save_to_disk``, or has files like train-00000-of-00001.parquet."""
    return (folder / "dataset_dict.json").is_file() or any(folder.glob("*-of-*.parquet"))


SOURCE = 'https://gluebenchmark.com/tasks, or datasets.load_dataset("nyu-mll/glue", NAME).save_to_disk("ROOT/NAME")'
GET = f"Get the files: {SOURCE}"

Split = Literal["train", "validation"]
Metric = Literal["acc", "matthews", "pearson"]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: Name in ``datasets``.
        title: Name in GLUE and of its folder.
        texts: Columns of the one or two sentences in the TSV files.
        label: Column of the label.
        labels: Names in the files, in the order of the class numbers; empty if the label is a score.
        names: Names of the classes, by number.
        metric: Metric that the paper reports.
    """

    name: str
    title: str
    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    names: tuple[str, ...]
    metric: Metric = "acc"


_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_BITS = ("0", "1")

TASKS = {
    task.name: task
    for task in (
        Task("sst2", "SST-2", ("sentence",), "label", _BITS, ("negative", "positive")),
        Task("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", _BITS, ("not_equivalent", "equivalent")),
        Task("cola", "CoLA", ("sentence",), "label", _BITS, ("unacceptable", "acceptable"), "matthews"),
        Task("qnli", "QNLI", ("question", "sentence"), "label", _ENTAILMENT, _ENTAILMENT),
        Task("rte", "RTE", _PAIR, "label", _ENTAILMENT, _ENTAILMENT),
        Task("stsb", "STS-B", _PAIR, "score", (), (), "pearson"),
    )
}

_TSV: dict[Split, str] = {"train": "train.tsv", "validation": "dev.tsv"}


def read_glue(root: Path, name: str, split: Split) -> Examples:
    """Return one split of one task, in the order of the file; GLUE keeps the labels of its test sets secret.

    Args:
        root: Folder that holds GLUE's folders (``SST-2`` ...) or the folders of ``datasets`` (``sst2`` ...).
        name: ``sst2``, ``mrpc``, ``cola``, ``qnli``, ``rte`` or ``stsb``.
        split: ``train`` or ``validation``.

    Raises:
        UserError: Files are missing (with expected tree and source) or a line is wrong (file and line).
    """
    task = TASKS[name]
    home = _home(root, task)
    if lacking := missing(root, name, split):
        if is_saved(home):
            what = f"{home} has no whole split {split!r}: {lacking} does not exist"
            raise UserError(f"{what}. Save or download it again")
        tree = f"{task.title}/train.tsv and {task.title}/dev.tsv"
        tree += f", or the folder {name} of save_to_disk or of Parquet files"
        raise UserError(f"{home / _TSV[split]} does not exist. Expected under --data.root: {tree}", GET)
    if is_saved(home):
        return _read_saved(home, split, task)
    sentences: list[tuple[str, ...]] = []
    labels: list[float] = []
    without_header = ("source", "label", "original_label", "sentence") if name == "cola" else ()
    for where, (*texts, label) in _table(home / _TSV[split], (*task.texts, task.label), without_header):
        if task.labels and label not in task.labels:
            what = f"the label {label[:40]!r} is not one of {', '.join(task.labels)}"
            raise UserError(f"{where}: {what}. Correct the line")
        value = task.labels.index(label) if task.labels else numeric(label)
        if not task.labels and not 0 <= value <= 5:
            raise UserError(f"{where}: the score {label[:40]!r} is not a number from 0 to 5. Correct the line")
        sentences.append(tuple(texts))
        labels.append(value)
    return Examples(sentences, labels)


def missing(root: Path, name: str, split: Split) -> Path | None:
    """Return the file or folder that a split of a task lacks, by the names of files alone; None if it is complete."""
    home = _home(root, TASKS[name])
    if not home.is_dir():
        return home
    if (home / "dataset_dict.json").is_file():
        state = home / split / "state.json"
        return None if state.is_file() else state if state.parent.is_dir() else state.parent
    if is_saved(home):
        files = [
            re.match(r"-(\d+)-of-(\d+)", path.name.removeprefix(split)) for path in home.glob(f"{split}-*.parquet")
        ]
        numbers = {int(file[1]): int(file[2]) for file in files if file}
        count = max(numbers.values(), default=1)
        lacking = (number for number in range(count) if number not in numbers)
        return next((home / f"{split}-{number:05}-of-{count:05}.parquet" for number in lacking), None)
    wanted = home / _TSV[split]
    return None if wanted.is_file() else wanted


def _home(root: Path, task: Task) -> Path:
    """Return the folder of a task: one that ``datasets`` wrote, else an existing one, else the expected one of GLUE."""
    folders = (root / task.title, root / task.name)
    return next((each for wanted in (is_saved, Path.is_dir) for each in folders if wanted(each)), folders[0])


def _read_saved(home: Path, split: Split, task: Task) -> Examples:
    from randlora_pl.data.readers.table import load_split  # not before data is read: it imports NumPy

    saved, where = (home / "dataset_dict.json").is_file(), f"{home}, split {split!r}"
    data = load_split(home, home / split if saved else sorted(home.glob(f"{split}-*-of-*.parquet")))
    columns = _PAIR if task.name == "mrpc" else task.texts
    if absent := [name for name in (*columns, "label") if name not in data.column_names]:
        there = ", ".join(data.column_names)
        raise UserError(f"{where}: the column {absent[0]!r} is missing (there are {there})")
    labels, most = list(data["label"]), len(task.labels) - 1 if task.labels else 5
    kind, expected = (int, f"0 to {most}") if task.labels else (int | float, "a score from 0 to 5")
    for row, label in enumerate(labels):
        if not (isinstance(label, kind) and 0 <= label <= most):
            raise UserError(f"{where}, row {row}: the label {label!r} is not {expected}")
    sentences = list(zip(*(data[name] for name in columns), strict=True))
    for row, texts in enumerate(sentences):
        for name, text in zip(columns, texts, strict=True):
            if not isinstance(text, str):
                raise UserError(f"{where}, row {row}: {name!r} is not a text but {text!r}")
    values = labels if task.labels else list(map(float, labels))
    return Examples([tuple(map(str.strip, texts)) for texts in sentences], values)


def _table(path: Path, columns: Sequence[str], fixed: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield location and selected columns of each line; ``fixed`` are all columns of a file without a header."""
    lines = lines_of(read_text(path))
    header = list(fixed or (lines[0].split("\t") if lines else ()))
    if absent := [column for column in columns if column not in header]:
        there = ", ".join(header)[:120] or "nothing"
        raise UserError(
            f"{path}, line 1: the header lacks {', '.join(absent)} (it has {there}). Download the file again"
        )
    indices = [header.index(column) for column in columns]
    start = 0 if fixed else 1
    for number, line in enumerate(lines[start:], start + 1):
        fields = line.split("\t")
        if len(fields) != len(header):
            what = f"{len(fields)} tab-separated fields, expected {len(header)} ({', '.join(header)})"
            raise UserError(f"{path}, line {number}: {what}. Correct the line, or download the file again")
        yield f"{path}, line {number}", [fields[index].strip() for index in indices]
    if len(lines) <= start:
        raise UserError(f"{path} has no examples. Download the file again")
