import logging
from pathlib import Path

import numpy as np
import pytest

from randlora_pl.commands.main import main
from randlora_pl.data import ImageData
from randlora_pl.data.loader import remarks
from tests.data.conftest import Tree, save_image


def labels(*counts: int) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        ((5, 5, 5), (1, 1, 1), []),
        ((5, 5, 1), (1, 1, 0), ["val/acc"]),
        ((150, 3, 2), (9, 1, 1), ["150 training images, 'c' 2"]),
        ((150, 0, 1), (9, 0, 0), ["1 in train, 2 in val", "'c' 1"]),
        ((9, 9, 9), (), []),
    ],
)
def test_small_classes_are_remarked_upon(train: tuple[int, ...], val: tuple[int, ...], words: list[str]) -> None:
    lines = remarks({"train": labels(*train), "val": labels(*val)}, ["a", "b", "c"])
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True))


@pytest.mark.parametrize(("balance", "lines"), [(None, 1), ("weights", 0), ("sampler", 0)])
def test_a_fit_remarks_once_on_what_it_does_not_balance(
    balance: str | None, lines: int, tree: Tree, caplog: pytest.LogCaptureFixture
) -> None:
    root = tree(**{"train/a": 20, "train/b": 2, "val/a": 1, "val/b": 1, "test/a": 1, "test/b": 1})
    data = ImageData(dataset="folder", root=str(root), steps=1, balance=balance)
    with caplog.at_level(logging.WARNING, "randlora_pl"):
        data.setup("fit")  # for the start page, then for the trainer
        data.setup("fit")
    assert len(caplog.messages) == lines and all("--data.balance weights" in line for line in caplog.messages)


def test_a_check_of_such_classes_is_not_as_expected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, count in (("x", 20), ("y", 20), ("town", 1)):
        for number in range(count):
            save_image(tmp_path / name / f"{number}.png")
    assert main(["data", "check", "folder", "--root", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "town" in shown and "0 as expected, 1 off" in shown
