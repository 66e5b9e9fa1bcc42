"""Classes of different size: remarks, weights of the losses, and orders with all classes equally often."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from randlora_pl.commands.main import main
from randlora_pl.data import ImageData
from randlora_pl.data.loader import ClassDraws, DrawPlan, TrainSchedule, class_weights, remarks
from tests.data.conftest import Tree, save_image

sizes = st.lists(st.integers(0, 9), min_size=2, max_size=6).filter(any)


def labels_of(counts: list[int]) -> torch.Tensor:
    """Labels of so many samples of each class, mixed."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(len(labels)))]


@given(sizes)
def test_weights_have_mean_one_and_give_every_class_the_same_share(counts: list[int]) -> None:
    labels = labels_of(counts)
    weights = class_weights(labels, len(counts))
    assert weights[labels].mean().item() == pytest.approx(1)
    shares = [weights[labels][labels == label].sum().item() for label in range(len(counts)) if counts[label]]
    assert shares == pytest.approx([len(labels) / len(shares)] * len(shares))
    assert all(weights[label] == 0 for label, count in enumerate(counts) if not count)


@given(sizes, st.integers(0, 2**40), st.integers(1, 9))
def test_turns_take_every_class_once_and_use_up_its_samples(counts: list[int], seed: int, rounds: int) -> None:
    labels = labels_of(counts)
    there = torch.unique(labels)
    positions = torch.arange(rounds * len(there))
    drawn = ClassDraws.from_labels(labels).samples(seed, positions, "epochs")
    for one in labels[drawn].view(rounds, -1):
        assert one.sort().values.tolist() == there.tolist()
    for label in there.tolist():
        own = drawn[labels[drawn] == label].tolist()
        size = counts[label]
        assert all(len(set(own[at : at + size])) == len(own[at : at + size]) for at in range(0, len(own), size))
    assert torch.equal(ClassDraws.from_labels(labels).samples(seed, positions.flip(0), "epochs"), drawn.flip(0))


def test_draws_with_replacement_are_uniform_over_classes_and_within_them() -> None:
    labels = labels_of([1, 4, 0, 15])
    drawn = ClassDraws.from_labels(labels).samples(3, torch.arange(60_000), "with_replacement")
    counts = torch.bincount(drawn, minlength=20)
    expected = torch.tensor([60_000 / 3 / size for size in (1, 4, 1, 15)])[labels]
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert chi2 < 43.8  # 99.9 % quantile of chi-squared with 19 degrees of freedom


@pytest.mark.parametrize("sampling", ["with_replacement", "epochs"])
@pytest.mark.parametrize("classes", [None, ClassDraws.from_labels(labels_of([1, 4, 15]))])
def test_ranks_and_micro_batches_share_the_samples_of_a_step(classes: ClassDraws | None, sampling: str) -> None:
    plan = DrawPlan(20, 90, 24, 1, sampling, classes)

    def union(step: int, batch: int, accumulate: int, world: int) -> list[int]:
        found: list[int] = []
        for rank in range(world):
            schedule = TrainSchedule(plan, batch, accumulate, world, rank)
            for number in range(step * accumulate, min((step + 1) * accumulate, len(schedule))):
                found += plan.samples(schedule[number].positions[schedule[number].weights > 0]).tolist()
        return sorted(found)

    for step in range(plan.steps):
        assert union(step, 24, 1, 1) == union(step, 6, 4, 1) == union(step, 6, 2, 2) == union(step, 8, 1, 3)


def test_weights_are_in_the_batches(tree: Tree) -> None:
    root = str(tree(cat=40, dog=5))
    plain, weighted = (
        ImageData(dataset="folder", root=root, steps=3, batch_size=8, image_size=8, balance=balance)
        for balance in (None, "weights")
    )
    for data in (plain, weighted):
        data.setup("fit")
    expected = class_weights(torch.from_numpy(weighted.samples("train").labels), 2)
    for one, other in zip(plain.train_dataloader(), weighted.train_dataloader(), strict=True):
        assert torch.equal(one["index"], other["index"])
        torch.testing.assert_close(other["weight"], one["weight"] * expected[one["label"]])
    assert "weighted" in weighted.summary_lines(weighted.summary())["data"]
    assert weighted.state_dict()["balance"] == "weights"
    drawn = ImageData(dataset="folder", root=root, steps=30, batch_size=8, image_size=8, balance="sampler")
    drawn.setup("fit")
    assert drawn.plan is not None
    shares = torch.bincount(torch.from_numpy(drawn.samples("train").labels)[drawn.plan.samples(torch.arange(240))])
    assert abs(shares[0] - 120) < 40


def labels(*counts: int) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        ((5, 5, 5), (1, 1, 1), []),
        ((5, 5, 1), (1, 1, 0), ["validation measures only"]),
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
