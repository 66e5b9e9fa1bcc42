#!/usr/bin/env python3
"""List the files of the program that a value passes in a short run.

    python scripts/walk.py rank       # from the shell to the weight
    python scripts/walk.py picture    # from the disk to the loss

A file counts if one of its functions, while it runs, holds the value: as an argument or local, or as an item or
attribute of one. The rank is a number that the run has nowhere else. A picture is its file's name, then an image of a
size that nothing else has, then a row of a batch with a number of rows that nothing else has.
"""

import argparse
import ast
import os
import runpy
import sys
import threading
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import numpy
from PIL import Image
from torch import Tensor

RANK = 113
SIDES = (43, 41)  # height and width of the pictures
ROWS = 13
NAME = "walked"
QUICK = ["fit", "--config", "quickstart"]


def has_rank(value: Any) -> bool:
    """Return whether a value is the rank, as a number or in a word of the command line."""
    return (type(value) is int and value == RANK) or (isinstance(value, str) and value.endswith(f"rank={RANK}"))


def has_picture(value: Any) -> bool:
    """Return whether a value is a picture, or a batch with one."""
    if isinstance(value, str | Path):
        return NAME in str(value)
    if issubclass(type(value), Image.Image):  # not isinstance, which asks the value, that may be one not imported yet
        return bool(value.size == SIDES[::-1])
    if not issubclass(type(value), Tensor | numpy.ndarray):
        return False
    shape = tuple(value.shape)
    return shape[:1] == (ROWS,) or any(pair == SIDES for pair in pairwise(shape))


def parts(value: Any) -> Iterable[Any]:
    """Return the items and attributes of a value."""
    if isinstance(value, dict):
        yield from [*value.values()][:100]
    elif isinstance(value, list | tuple):
        yield from value[:100]
    try:
        yield from [*vars(value).values()]
    except TypeError:  # it has no attributes
        return


class Walk:
    """Files in which an executed function holds a value.

    Args:
        package: Folder of the program.
        matches: Function that returns whether a value is the one that is followed.
    """

    def __init__(self, package: Path, matches: Any) -> None:
        self.package = f"{package}{os.sep}"
        self.matches = matches
        self.files: dict[str, None] = {}  # in the order in which they were entered

    def enter(self, frame: FrameType, event: str, _: Any) -> Any:
        """Follow the named functions of the program: a generator may count up to the value."""
        file = frame.f_code.co_filename
        if not file.startswith(self.package) or file in self.files or frame.f_code.co_name.startswith("<"):
            return None
        self.look(frame)
        frame.f_trace_lines = False
        return self.leave

    def leave(self, frame: FrameType, event: str, _: Any) -> Any:
        """Look at the locals when a function returns."""
        if event == "return":
            self.look(frame)
        return self.leave

    def look(self, frame: FrameType) -> None:
        """Note the file of a function that holds the value."""
        for value in list(frame.f_locals.values()):
            if self.matches(value) or any(self.matches(part) for part in parts(value)):
                self.files.setdefault(frame.f_code.co_filename)
                return


def main() -> None:
    """Run the program in this process and print the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("value", choices=["rank", "picture"])
    options = parser.parse_args()
    package = Path(__file__).resolve().parents[1] / "src"
    sys.path.insert(0, str(package))

    with TemporaryDirectory() as folder:
        words = [*QUICK, "--run.root", f"{folder}/runs", "--data.steps", "1"]
        if options.value == "rank":
            words.append(f"--model.adapter.rank={RANK}")
        else:
            for split in ("train", "test"):
                for index in range(3 * ROWS):  # so that no class, and no list of mistakes, has ROWS of them
                    file = Path(folder) / NAME / split / "ab"[index % 2] / f"{index}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    pixels = numpy.random.default_rng(index).integers(0, 255, (*SIDES, 3), dtype=numpy.uint8)
                    Image.fromarray(pixels).save(file)
            words += ["--data.dataset=folder", f"--data.root={folder}/{NAME}", f"--data.batch_size={ROWS}"]
            words.append("--data.num_workers=0")
        sys.argv = ["randlora-pl", *words]
        walk = Walk(package / "randlora_pl", has_rank if options.value == "rank" else has_picture)
        threading.settrace(walk.enter)
        sys.settrace(walk.enter)
        try:
            runpy.run_module("randlora_pl", run_name="__main__")
        except SystemExit as end:
            code = end.code
        sys.settrace(None)
    for file in map(Path, walk.files):
        summary = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        print(f"| `{file.relative_to(walk.package).as_posix()}` | {summary.replace('``', '`')} |")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
