"""Availability of the texts of a dataset on this machine, by the names of their files alone."""

from collections.abc import Sequence
from pathlib import Path

from randlora_pl.language.catalog import OWN_TEXTS
from randlora_pl.language.datasets import commonsense, e2e, glue
from randlora_pl.language.datasets.text_files import first_file
from randlora_pl.utils.errors import UserError

_OWN = (
    "your own texts, see docs/prompts.md and docs/labelled_texts.md; of a bundled sweep, by the commands in the first "
    "lines of its config (randlora-pl config cat sweeps/NAME)"
)


def absent(dataset: str, root: Path, tests: Sequence[str] | None = None, trains: bool = True) -> UserError | None:
    """Return the missing part of a dataset and its source; None if all of it is there.

    Args:
        dataset: Name of the dataset.
        root: The folder of the data.
        tests: Selected commonsense tests, None for all.
        trains: True if training samples are needed.
    """
    try:
        if dataset in glue.TASKS:
            lacking = [glue.missing(root, dataset, "train")] * trains + [glue.missing(root, dataset, "validation")]
            return next((UserError(f"{each} does not exist", glue.GET) for each in lacking if each), None)
        if dataset in OWN_TEXTS:
            name = f"train.{dataset}"
            if not root.is_file():
                first_file(root, (name,), name, _OWN)
        elif dataset == "e2e":
            for name in ("train.txt", "valid.txt", "test.txt"):
                first_file(root, (name,), e2e.TREE, e2e.SOURCE)
        else:
            wanted = [f"ft-training_set/{dataset}.json"] * trains
            for name in [*wanted, *(f"dataset/{test}/test.json" for test in tests or commonsense.TASKS)]:
                first_file(root, (name.partition("/")[2], name), commonsense.TREE, commonsense.SOURCE)
    except UserError as error:
        return error
    return None
