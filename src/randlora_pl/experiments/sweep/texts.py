"""Steps and test samples of a cell on texts."""

import math

from randlora_pl.experiments.sweep.description import Tree
from randlora_pl.language.catalog import TASKS
from randlora_pl.language.dataset_sizes import SIZES, TESTS, Size


def is_text(tree: Tree) -> bool:
    """Return True if a cell's data are texts, by the name of its task."""
    return str(tree["model"]["class_path"]).rpartition(".")[2] in TASKS


def test_samples(tree: Tree) -> int | None:
    """Return the number of test samples; None if it is unknown."""
    data = tree["data"]
    tests, size = data.get("tests"), _size(tree)
    return sum(TESTS.get(test, 0) for test in tests) if tests else size.test if size else None


def text_steps(tree: Tree, window: int) -> int | None:
    """Return the optimizer steps of a cell; None if the number of samples is unknown.

    Args:
        tree: Config of the cell.
        window: Samples of an optimizer step.
    """
    data, size = tree["data"], _size(tree)
    if data.get("steps"):
        return int(data["steps"])
    if size is None:
        return None
    aside = size.aside if data.get("validation") is None else int(data["validation"])
    return math.ceil((size.train - aside) * int(data.get("epochs") or size.epochs) / window)


def _size(tree: Tree) -> Size | None:
    return SIZES.get(str(tree["data"].get("dataset")))


test_samples.__test__ = False  # type: ignore[attr-defined]  # no test of pytest's, wherever it is imported
