"""``fit --trainer.fast_dev_run true`` over each of the paper's datasets, in tiny copies of their true formats."""

import gc
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.data.catalog import PAPER
from randlora_pl.run.callbacks.figures import MOST_CLASSES, MOST_COUNTED
from tests.data.readers.conftest import Copies, Copy, copies, written  # noqa: F401  (fixtures)
from tests.support.cli import Run
from tests.support.products import marked

BATCHES = (
    *("--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"),
    *("--trainer.enable_progress_bar", "false", "--data.batch_size", "2", "--data.eval_batch_size", "4"),
)
pytestmark = pytest.mark.usefixtures("drawn")
FIGURES = r"accuracy \d+\.\d\d %, (balanced accuracy [\d.]+ %, )?loss \d+\.\d{4}\b"


LONG = "gtsrb"
"""Its classes have names of which the tiny CLIP's text tower reads only the beginning."""


@pytest.mark.parametrize(("name",), marked(zip(name for name in PAPER if name != LONG), lambda row: row[0] == "mnist"))
def test_fit_with_the_tiny_clip(run: Run, copies: Copies, tmp_path: Path, name: str) -> None:  # noqa: F811
    fit(run, copies(name), tmp_path, "quickstart")


@pytest.mark.full
def test_classes_of_equal_prompts_are_refused(run: Run, copies: Copies) -> None:  # noqa: F811
    words = ("--config", "quickstart", "--model.pretrained", "random", "--data.dataset", LONG)
    result = run("fit", *words, "--data.root", str(copies(LONG).root), *BATCHES)
    assert result.code == 2 and "have the same prompt: the text tower reads 16 tokens" in result.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config", "count"), [("mnist", "clip_vitb32", 5_170_320), ("imagenet", "dinov2_vitb14", 3_566_592)]
)
def test_fit_with_a_true_architecture(
    run: Run, request: pytest.FixtureRequest, tmp_path: Path, name: str, config: str, count: int
) -> None:
    results = fit(run, request.getfixturevalue("copies")(name), tmp_path, config)
    assert results["base/image_size"] == 224 and results["adapter_parameters"] == count
    gc.collect()  # Lightning's objects refer to each other, and each model is half a gigabyte


def fit(run: Run, copy: Copy, place: Path, config: str) -> dict[str, Any]:
    """One step between two evaluations, and all that must hold of it whatever the dataset; returns the results."""
    os.environ["RANDLORA_PL_CACHE"] = str(place / "cache")  # of the copy that the fixture `run` made
    before = stamps(copy.root)
    words = ("--config", config, "--model.pretrained", "random", "--data.dataset", copy.row.name)
    result = run("fit", *words, "--data.root", str(copy.root), *BATCHES)
    assert result.code == 0, result.err
    unexpected = [line for line in result.err.splitlines() if " images here, expected " not in line]
    assert not unexpected, "nothing but that a tiny copy lacks images"

    classes = copy.row.classes
    assert classes is not None
    (folder,) = (place / "runs").glob("*/2*")
    assert {path.name for path in place.iterdir()} == {"runs"}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        *("config.yaml", "results.json", "run.log", "checkpoints/last.ckpt"),
        *("adapter/adapter.safetensors", "adapter/adapter_config.json"),
        *("adapter-best/adapter.safetensors", "adapter-best/adapter_config.json"),
        *("test_per_class.csv", "figures/predictions.png", "figures/mistakes.png"),
        *(["figures/confusion.csv"] if classes <= MOST_COUNTED else []),
        *(["figures/confusion.png"] if classes <= MOST_CLASSES else []),
    }
    assert stamps(copy.root) == before

    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    metadata = json.loads((folder / "adapter" / "adapter_config.json").read_text())["metadata"]
    assert results["data/classes"] == len(metadata["classnames"]) == classes
    assert f"{copy.row.name}: {classes} classes, " in result.out
    assert metadata["classnames"] == list(copy.row.classnames or copy.made.names)
    counts = [results[f"data/{split}"] for split in ("train", "val", "test")]
    assert min(counts) > 0 and sum(counts) == sum(copy.made.sizes.values()) * classes

    assert results["finished"] and results["steps"] == 1 and results["data/skipped"] == 0
    assert re.search(rf"^test +{FIGURES}", result.out, re.MULTILINE), result.out  # what is not finite is not printed
    assert "val/acc" in results
    own_head = results["task"] == "LinearHeadTask"
    assert bool(re.search(rf"^zero-shot: {FIGURES}", result.out, re.MULTILINE)) is not own_head
    head = 768 * classes if own_head else 0  # of features as wide as ViT-B's
    assert results["trainable_parameters"] == results["adapter_parameters"] + head
    shutil.rmtree(folder)  # a hundred megabytes each
    return results


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [root, *root.rglob("*")]}
