"""Optimizer steps and test samples of a cell, as far as the size of its dataset is known."""

import math

from randlora_pl.data.catalog.coop import SPLITS, with_split
from randlora_pl.data.catalog.registry import CATALOG
from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.language.catalog import SIZES, TASKS, TESTS
from randlora_pl.sweep.description import Tree


def is_text(tree: Tree) -> bool:
    """Return True if a cell's data are texts, by the name of its task."""
    return str(tree["model"]["class_path"]).rpartition(".")[2] in TASKS


def evaluated_samples(tree: Tree) -> int | None:
    """Return the test images or texts of a cell, None if they are not counted."""
    data = tree["data"]
    if not is_text(tree):
        row = CATALOG.get(data["dataset"])
        if row is None:
            return None
        return _of_half(data, with_split(row, data.get("split") or SPLITS[0]), "test")
    if tests := data.get("tests"):
        return sum(TESTS.get(test, 0) for test in tests)
    size = SIZES.get(str(data.get("dataset")))
    return size.test if size else None


def planned_steps(tree: Tree) -> int | None:
    """Return the optimizer steps of a cell, None if its samples are not counted.

    Raises:
        UserError: An option is impossible.
    """
    if tree["data"].get("steps"):
        planned: int | None = int(tree["data"]["steps"])
    else:
        planned = _text_steps(tree) if is_text(tree) else _image_steps(tree)
    limit = tree.get("trainer", {}).get("max_steps")
    return planned if planned is None or limit is None or int(limit) < 0 else min(planned, int(limit))


def global_batch(tree: Tree) -> int:
    """Return the number of images of an optimizer step."""
    accumulated = int(tree.get("trainer", {}).get("accumulate_grad_batches", 1) or 1)
    return int(tree.get("data", {}).get("batch_size", 128)) * accumulated


def _text_steps(tree: Tree) -> int | None:
    data = tree["data"]
    size = SIZES.get(str(data.get("dataset")))
    if size is None:
        return None
    aside = size.aside if data.get("validation") is None else int(data["validation"])
    return math.ceil((size.train - aside) * int(data.get("epochs") or size.epochs) / global_batch(tree))


def _labels(data: Tree, classes: int) -> range:
    """Return the labels of a dataset that a cell uses, of all of its classes or of half."""
    from randlora_pl.data.sampling.splits import labels_of

    return labels_of(classes, data.get("classes") or "all")


def _of_half(data: Tree, row: DatasetSpec, split: str) -> int | None:
    """Return the images of a split; of half of the classes in proportion, because their sizes are unknown."""
    count = row.counts.get(split)
    return count and round(count * len(_labels(data, row.classes)) / row.classes) if row.classes else count


def _image_steps(tree: Tree) -> int | None:
    from randlora_pl.data.image_splits import FEW_SHOT_EPOCHS
    from randlora_pl.data.sampling.schedule import samples_drawn
    from randlora_pl.sweep.expand import data_of

    data, row = tree["data"], data_of(tree).row
    images = _of_half(data, row, "train")
    shots, fraction = data.get("shots"), data.get("fraction")
    if shots:
        images = row.classes and min(int(shots) * len(_labels(data, row.classes)), images or 10**12)
    elif fraction and images is not None:
        images = round(float(fraction) * images)
    if not images:
        return None
    epochs = data.get("epochs") or (FEW_SHOT_EPOCHS if shots else row.epochs)
    least = int(data.get("min_batches_per_epoch", 10)) if shots or row.own else 0
    return math.ceil(samples_drawn(images, int(epochs), global_batch(tree), least) / global_batch(tree))
