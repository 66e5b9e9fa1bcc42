"""Several labels of an image: a run from a table to everything that reads its adapter."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from randlora_pl.adapters import LoRA, read_adapter
from randlora_pl.data import ImageData
from randlora_pl.data.unlabelled import open_images
from randlora_pl.interop.base_model import load_base
from randlora_pl.interop.hub import make_card
from randlora_pl.interop.merge import merged
from randlora_pl.interop.onnx import load_program
from randlora_pl.run.callbacks import PerClass
from randlora_pl.serving.app import ClassifierAPI
from randlora_pl.serving.uploads import Upload
from randlora_pl.tasks import AdaptationModule, LinearHeadTask, TextHeadTask, load_task, make_trainer
from randlora_pl.utils.errors import UserError
from tests.support.cli import Run

pytestmark = pytest.mark.usefixtures("deep")
WORDS = ("zero", "one", "two", "three")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of none, one or two of the first four digits, side by side."""
    folder, random = tmp_path_factory.mktemp("two"), np.random.default_rng(0)
    digits = load_digits(n_class=4)
    rows = []
    for number in range(240):
        picture, names = np.zeros((16, 16)), set()
        for place, shown in enumerate(random.random(2) < 0.7):
            chosen = random.integers(len(digits.target))
            if shown:
                picture[4:12, 8 * place : 8 * place + 8] = digits.images[chosen]
                names.add(WORDS[digits.target[chosen]])
        Image.fromarray((picture * 255 / 16).astype(np.uint8)).save(folder / f"{number:03d}.png")
        rows.append((f"{number:03d}.png", ";".join(sorted(names))))
    with (folder / "two.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "labels"), *rows])
    return folder / "two.csv"


@pytest.fixture(scope="module")
def trained(table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float], PerClass, Path]:
    """The adapter of a short training, its test, and its run folder."""
    folder = tmp_path_factory.mktemp("run")
    data = ImageData(
        dataset="table", root=str(table), steps=20, batch_size=16, flip=False, crop_scale=(1, 1), num_workers=0
    )
    task = LinearHeadTask("tiny", adapter=LoRA(rank=4), learning_rate=5e-3, head_learning_rate=0.1)
    per_class = PerClass()
    trainer = make_trainer(accelerator="cpu", callbacks=[per_class], default_root_dir=folder)
    module = AdaptationModule(task)
    trainer.fit(module, data)
    (metrics,) = trainer.test(module, data, verbose=False)
    return task.save(folder / "adapter"), metrics, per_class, folder


def test_a_run_learns_what_is_in_a_picture(trained: tuple[Path, dict[str, float], PerClass, Path]) -> None:
    _, metrics, per_class, folder = trained
    rows = list(csv.DictReader((folder / "test_per_class.csv").open()))
    chance = sum(int(row["samples"]) for row in rows) / len(rows) / 48
    assert metrics["test/map"] > chance + 0.4 and metrics.keys() == {"test/map", "test/f1", "test/loss"}
    precisions = [float(row["average_precision"]) for row in rows]
    assert metrics["test/map"] == pytest.approx(sum(precisions) / len(precisions), abs=1e-4)
    assert metrics["test/f1"] == pytest.approx(sum(float(row["f1"] or 0) for row in rows) / len(rows), abs=1e-4)
    assert per_class.facts.keys() == {"test/smallest_class", "test/largest_class"}


def test_every_way_out_gives_the_same_sigmoids(
    trained: tuple[Path, dict[str, float], PerClass, Path], table: Path, tmp_path: Path, run: Run
) -> None:
    adapter = trained[0]
    task = load_task(adapter)
    loader, files = open_images([table.parent], task.frame, 8)
    batch = next(iter(loader))
    with torch.inference_mode():
        logits = task.class_logits(batch["image"])
        expected = 1 / (1 + (-logits).exp())
        torch.testing.assert_close(task.predict(batch), expected)
        program = load_program(adapter)
        assert "sigmoid" in program.facts["probabilities"]
        pixels = batch["image"] * program.module.encoder.std + program.module.encoder.mean  # type: ignore[union-attr, operator]
        torch.testing.assert_close(program.module(pixels)[1], expected, atol=1e-4, rtol=1e-4)  # that is exported
    assert not torch.allclose(expected.sum(1), torch.ones(8), atol=0.05)
    api = object.__new__(ClassifierAPI)
    api.tasks, api.shelf, api.index, api.autocast = {"": task}, None, torch.device("cpu"), torch.no_grad()
    served = api._probabilities({Upload(b"", 0, 1): image for image in batch["image"].split(1)})
    torch.testing.assert_close(torch.stack(served), expected)
    file = tmp_path / "predicted.csv"
    run("predict", "--adapter", str(adapter), "--images", *map(str, files[:8]), "--output", str(file), "--top-k", "4")
    for row, values in zip(csv.DictReader(file.open()), expected.tolist(), strict=True):
        cells = [row["probability"], *(row[f"probability_{number}"] for number in (2, 3, 4))]
        assert [float(cell) for cell in cells] == pytest.approx(sorted(values, reverse=True), abs=1e-5)
        likely = [name for name, value in zip(task.classnames, values, strict=True) if value > 0.5]
        assert row["labels"] == ";".join(likely)
    read = read_adapter(adapter)
    assert "any number for an image" in make_card(read, "me/two")
    assert merged(load_base(read), read).several


def test_other_tasks_and_other_data_are_refused_before_a_model_is_loaded(
    trained: tuple[Path, dict[str, float], PerClass, Path], table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextHeadTask, "build", lambda self: pytest.fail("a model was loaded"))
    data = ImageData(dataset="table", root=str(table), steps=1, num_workers=0)
    data.setup("fit")
    assert "4 classes (any number for an image)" in str(data.summary_lines(data.summary()))
    with pytest.raises(UserError, match=r"TextHeadTask learns one class .* several labels.*--model LinearHeadTask"):
        make_trainer(accelerator="cpu").fit(AdaptationModule(TextHeadTask("tiny", adapter=LoRA(rank=2))), data)
    task = load_task(trained[0])
    with pytest.raises(UserError, match="built for one label of each image, or for several"):
        task.set_classes(task.classnames, task.templates)
