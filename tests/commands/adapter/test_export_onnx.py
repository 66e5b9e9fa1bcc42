"""Predictions of exported files, as users elsewhere get them, against ``predict``."""

import csv
import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from randlora_pl.data import ImageData
from randlora_pl.data.transforms import eval_pixels
from randlora_pl.utils.image_spec import ImageSpec
from tests.support.cli import Refused, Run

ELSEWHERE = """
import json, sys
import numpy as np
pixels = np.load("pixels.npy")
{lines}
names = json.loads(session.get_modelmeta().custom_metadata_map["classnames"])
assert "torch" not in sys.modules and "randlora_pl" not in sys.modules
np.save("probabilities.npy", probabilities)
print(json.dumps([names[place] for place in probabilities.argmax(1)]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("deep")
def test_all_test_digits_get_the_same_classes_in_onnxruntime(run: Run, tmp_path: Path) -> None:
    options = ("--data.steps", "12", "--data.batch_size", "32", "--run.root", "runs")
    trained = run("fit", "--config", "quickstart", *options)
    assert trained.code == 0, trained.err
    adapter = str(next(tmp_path.glob("runs/*/2*/adapter")))
    exported = run("adapter", "export", adapter, "--to", "onnx", "--output", "model.onnx")
    assert exported.code == 0 and exported.err == "", exported.err
    size = (tmp_path / "model.onnx").stat().st_size
    assert f"model.onnx: {size:,} bytes, classifier of 10 classes" in exported.out
    assert float(re.search(r"largest difference from PyTorch (\S+)", exported.out)[1]) < 1e-4  # type: ignore[index]

    data = ImageData(dataset="digits")
    data.setup("test")
    samples = data.samples("test")
    (tmp_path / "test").mkdir()
    images = [torch.from_numpy(np.array(samples.images.load(int(row)))).view(8, 8, 1) for row in samples.rows]
    for place, image in enumerate(images):
        Image.fromarray(image.numpy().squeeze()).save(tmp_path / "test" / f"{place:03}.png")
    predicted = run("predict", "--adapter", adapter, "--images", "test", "--top-k", "10", "--output", "-")
    rows = list(csv.reader(io.StringIO(predicted.out)))[1:]
    assert len(rows) == 360

    spec = ImageSpec(32, interpolation="bicubic")
    grey = torch.cat([eval_pixels([image], spec) for image in images])
    np.save(tmp_path / "pixels.npy", (grey.expand(-1, 3, -1, -1).float() / 255).numpy())
    lines = "\n".join(line.strip() for line in exported.out.split("alone:\n")[1].splitlines()[:3])
    predictions = [row[1] for row in rows]
    assert printed_by(ELSEWHERE.format(lines=lines), tmp_path) == predictions  # the lines that were printed
    right = sum(row[1] == data.classnames[label] for row, label in zip(rows, samples.labels, strict=True))
    assert right > 180  # it has learnt something: 36 are chance

    shares = np.load(tmp_path / "probabilities.npy")
    for row, share in zip(rows, shares, strict=True):
        named = dict(zip(row[1::2], map(float, row[2::2]), strict=True))
        assert np.abs(share - [named[name] for name in data.classnames]).max() < 1e-4


def printed_by(program: str, folder: Path) -> list[str]:
    """What a Python program prints, without this project's checkout on its path."""
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@pytest.mark.slow
def test_torch_program(run: Run, finished: Path, tmp_path: Path) -> None:
    base = ("adapter", "export", str(finished / "adapter"), "--to", "torch", "--part", "image", "--output")
    (tmp_path / "image.pt2").write_text("older")
    assert run(*base, "image.pt2").code == 2 and (tmp_path / "image.pt2").read_text() == "older"
    result = run(*base, "image.pt2", "--overwrite")
    assert result.code == 0 and result.err == "", result.err
    assert "image.pt2: " in result.out and "features = program(pixels)" in result.out
    pixels = torch.rand(4, 3, 32, 32)
    lines = [line.strip() for line in result.out.split("alone:\n")[1].splitlines()[:3]]
    there = {"pixels": pixels}
    exec("\n".join(lines).replace("image.pt2", str(tmp_path / "image.pt2")), there)
    torch.testing.assert_close(there["features"].norm(dim=1), torch.ones(4))


def test_bad_input(refused: Refused, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ("adapter", "export", str(finished / "adapter"), "--to")
    assert ".onnx" in refused(*base, "onnx", "--output", "model")
    assert ".pt2" in refused(*base, "torch", "--output", "model.onnx")
    (tmp_path / "folder.onnx").mkdir()
    assert "is a folder" in refused(*base, "onnx", "--output", "folder.onnx", "--overwrite")
    other = str(finished / "checkpoints")
    assert "RUN/adapter" in refused("adapter", "export", other, "--to", "torch", "--output", "m.pt2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "[onnx]'" in refused(*base, "onnx", "--output", "m.onnx")
