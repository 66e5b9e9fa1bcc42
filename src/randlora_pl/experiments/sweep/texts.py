"""What a cell on texts takes: its steps, its samples and the operations on their tokens."""

import math

from randlora_pl.experiments.sweep.description import Tree
from randlora_pl.language.catalog import TASKS
from randlora_pl.language.dataset_sizes import SIZES, TESTS, Size


def is_text(tree: Tree) -> bool:
    """Whether a cell's data are texts, by the name of its task."""
    return str(tree["model"]["class_path"]).rpartition(".")[2] in TASKS


def test_samples(tree: Tree) -> int | None:
    """Samples that are tested; None where nobody has counted them."""
    data = tree["data"]
    tests, size = data.get("tests"), _size(tree)
    return sum(TESTS.get(test, 0) for test in tests) if tests else size.test if size else None


def text_steps(tree: Tree, window: int) -> int | None:
    """Optimizer steps of a cell; None where nobody has counted its samples.

    Args:
        tree: Its config.
        window: Samples of an optimizer step.
    """
    data, size = tree["data"], _size(tree)
    if data.get("steps"):
        return int(data["steps"])
    if size is None:
        return None
    aside = size.aside if data.get("validation") is None else int(data["validation"])
    return math.ceil((size.train - aside) * int(data.get("epochs") or size.epochs) / window)


def text_tokens(tree: Tree) -> tuple[int, int]:
    """Tokens of a sample that is learned, and of one that is tested, with all that every beam may write."""
    model, size = tree["model"].get("init_args") or {}, _size(tree)
    most = tree["data"].get("cutoff") or tree["data"].get("max_length") or 256
    tokens = size.tokens if size else int(most)
    writes = "max_new_tokens" in model or "num_beams" in model
    return tokens, tokens + (int(model.get("num_beams", 1)) * int(model.get("max_new_tokens", 32)) if writes else 0)


def _size(tree: Tree) -> Size | None:
    return SIZES.get(str(tree["data"].get("dataset")))


test_samples.__test__ = False  # type: ignore[attr-defined]  # no test of pytest's, wherever it is imported
