import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from randlora_pl.cli.predict import parse, pick_device
from randlora_pl.data import ImageData
from randlora_pl.errors import UserError
from randlora_pl.tasks import load_task
from tests.cli.conftest import Run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three of scikit-learn's digits as image files, one in a sub-folder."""
    from sklearn.datasets import load_digits

    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    digits = load_digits().images[:3]
    for name, digit in zip(("a.png", "b.png", "more/c.png"), digits, strict=True):
        Image.fromarray((digit * 15).astype(np.uint8)).save(folder / name)
    return folder


def test_predictions_are_those_of_the_task(run: Run, finished: Path, photos: Path, tmp_path: Path) -> None:
    result = run("predict", "--adapter", str(finished / "adapter"), "--images", str(photos), "--output", "p.csv")
    assert result.code == 0, result.err
    assert "p.csv: 3 images, the best 5 classes of each" in result.out
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [Path(row["image"]).name for row in rows] == ["a.png", "b.png", "c.png"]
    task = load_task(finished / "adapter")
    with torch.no_grad():
        for row in rows:
            pixels = np.asarray(Image.open(row["image"]).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))
            spec = task.image_spec
            image = (torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - torch.tensor(spec.mean).view(3, 1, 1)) / (
                torch.tensor(spec.std).view(3, 1, 1)
            )
            shares = task.class_logits(image[None]).softmax(1)[0]
            named = {task.classnames[place]: float(share) for place, share in enumerate(shares)}
            assert float(row["probability"]) == pytest.approx(named[row["class"]], abs=0.05)  # another resize
            listed = [float(row[key]) for key in row if key.startswith("probability")]
            assert listed == sorted(listed, reverse=True)


def test_predictions_agree_with_the_test(run: Run, finished: Path, tmp_path: Path) -> None:
    """The data module's own test images, written to files, get the classes that the test counted."""
    data = ImageData(dataset="digits")
    data.setup("test")
    samples = data.samples("test")
    folder = tmp_path / "test"
    folder.mkdir()
    for place in range(32):
        pixels = np.asarray(samples.images.load(int(samples.rows[place])))
        Image.fromarray(pixels.squeeze()).save(folder / f"{place:03}.png")
    result = run("predict", "--adapter", str(finished / "adapter"), "--images", str(folder), "--output", "-")
    rows = list(csv.DictReader(io.StringIO(result.out)))
    right = sum(row["class"] == data.classnames[samples.labels[place]] for place, row in enumerate(rows))
    tested = run("test", "--run", str(finished), "--run.root", "runs").out
    assert f"accuracy {100 * right / 32:.2f} %" in tested


def test_top_k_batches_and_standard_output(run: Run, finished: Path, photos: Path) -> None:
    base = ("predict", "--adapter", str(finished / "adapter"), "--images", str(photos), "--output", "-")
    one, many = run(*base, "--top-k", "2", "--batch-size", "1").out, run(*base, "--top-k", "99").out
    assert one.splitlines()[0] == "image,class,probability,class_2,probability_2"
    assert len(many.splitlines()[1].split(",")) == 1 + 2 * 10
    assert [row["class"] for row in csv.DictReader(io.StringIO(one))] == [
        row["class"] for row in csv.DictReader(io.StringIO(many))
    ]


def test_nothing_is_overwritten(
    run: Run, refused: Callable[..., str], finished: Path, photos: Path, tmp_path: Path
) -> None:
    base = ("predict", "--adapter", str(finished / "adapter"), "--images", str(photos), "--output")
    (tmp_path / "p.csv").write_text("mine")
    assert "p.csv exists" in refused(*base, "p.csv")
    assert (tmp_path / "p.csv").read_text() == "mine"
    assert run(*base, "p.csv", "--overwrite").code == 0
    assert "does not exist" in refused(*base, "nowhere/p.csv")


def test_bad_input(refused: Callable[..., str], finished: Path, photos: Path, tmp_path: Path) -> None:
    adapter, images = str(finished / "adapter"), str(photos)
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:60])
    message = refused("predict", "--adapter", adapter, "--images", images)
    assert "broken.png" in message and "Leave it out of --images" in message
    assert "does not exist" in refused("predict", "--adapter", adapter, "--images", "nowhere.png")
    assert "Did you mean" in refused("predict", "--adapter", str(finished), "--images", images)
    assert "required: --adapter" in refused("predict", "--images", images)
    assert "Did you mean '--images'" in refused("predict", "--adapter", adapter, "--images", images, "--imagees", "x")
    assert "--top-k is 0" in refused("predict", "--adapter", adapter, "--images", images, "--top-k", "0")


def test_unreadable_images_can_be_skipped(run: Run, finished: Path, photos: Path, tmp_path: Path) -> None:
    base = ("predict", "--adapter", str(finished / "adapter"), "--images", str(photos), "--batch-size", "1")
    assert run(*base, "--output", "whole.csv").code == 0
    (photos / "aa-broken.png").write_bytes(b"no image")
    result = run(*base, "--output", "rest.csv", "--on-error", "skip")
    assert result.code == 0 and "1 unreadable images are left out" in result.out
    assert (tmp_path / "rest.csv").read_text() == (tmp_path / "whole.csv").read_text()


def test_truncated_adapter_names_the_file(
    refused: Callable[..., str], finished: Path, photos: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "adapter_config.json").write_bytes((finished / "adapter" / "adapter_config.json").read_bytes())
    (copy / "adapter.safetensors").write_bytes((finished / "adapter" / "adapter.safetensors").read_bytes()[:500])
    message = refused("predict", "--adapter", str(copy), "--images", str(photos))
    assert "adapter.safetensors" in message and "truncated" in message


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device tpu is not on this machine"):
        pick_device("tpu")
    for name in ("cpu:x", "cpu:7"):
        with pytest.raises(UserError, match=f"--device {name} is "):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="the last one is cuda:1"):
        pick_device("cuda:7")
    assert parse(["--adapter", "a", "--images", "b", "c"]).images == [Path("b"), Path("c")]
