import csv
import errno
import io
import json
import os
import shutil
import tempfile
import unittest.mock
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from randlora_pl.commands.common import pick_device
from randlora_pl.commands.predict import PredictionTable, name_adapters
from randlora_pl.data import open_images
from randlora_pl.data.sources import FileImages
from randlora_pl.prompts import CoOp
from randlora_pl.tasks import DePT, LinearHeadTask, PromptTask, load_task
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec
from randlora_pl.utils.text import csv_text
from tests.support.cli import Refused, Run
from tests.support.products import in_one_item, marked
from tests.tasks.small import shake


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
    loader, _ = open_images([photos], task.image_spec)
    with torch.no_grad():
        [shares] = [task.class_logits(batch["image"]).softmax(1) for batch in loader]
    for row, expected in zip(rows, shares, strict=True):
        listed = [float(row[key]) for key in row if key.startswith("probability")]
        assert listed == pytest.approx(expected.sort(descending=True).values[:5].tolist(), abs=1e-5)
        assert row["class"] == task.classnames[int(expected.argmax())]


def test_half_precision_is_near_and_that_of_serve(
    run: Run, finished: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ("predict", "--adapter", str(finished / "adapter"), "--images", str(photos), "--output", "-")
    whole, half = (read(run(*base, "--precision", precision).out) for precision in ("32", "bf16"))
    assert whole != half
    for one, other in zip(whole, half, strict=True):
        assert one["class"] == other["class"]
        assert float(one["probability"]) == pytest.approx(float(other["probability"]), abs=0.05)
    pytest.importorskip("litserve")
    from randlora_pl.serving import ServerOptions, app, uploads

    monkeypatch.setattr(app, "trust_the_limit", lambda: None)  # of the worker's process, as are its threads
    options = ServerOptions(adapter=finished / "adapter", precision="bf16", workers=64)
    served = app.ClassifierAPI(options, 1 << 20)
    served._build("cpu")
    loader, _ = open_images([photos], served.tasks[""].frame)
    images = torch.cat([batch["image"] for batch in loader]).split(1)
    shares = torch.stack(served._probabilities({uploads.Upload(b"", 0, 1): image for image in images}))
    expected = [float(row["probability"]) for row in half]  # products of another batch size round differently
    assert shares.max(1).values.tolist() == pytest.approx(expected, abs=2e-3)


def test_top_k_batches_and_standard_output(run: Run, finished: Path, photos: Path) -> None:
    base = ("predict", "--adapter", str(finished / "adapter"), "--images", str(photos), "--output", "-")
    one, many = run(*base, "--top-k", "2", "--batch-size", "1").out, run(*base, "--top-k", "99").out
    assert one.splitlines()[0] == "image,class,probability,class_2,probability_2"
    assert len(many.splitlines()[1].split(",")) == 1 + 2 * 10
    assert [row["class"] for row in csv.DictReader(io.StringIO(one))] == [
        row["class"] for row in csv.DictReader(io.StringIO(many))
    ]


def test_nothing_is_overwritten(run: Run, refused: Refused, finished: Path, photos: Path, tmp_path: Path) -> None:
    base = ("predict", "--adapter", str(finished / "adapter"), "--images", str(photos), "--output")
    (tmp_path / "p.csv").write_text("mine")
    assert "p.csv exists" in refused(*base, "p.csv")
    assert (tmp_path / "p.csv").read_text() == "mine"
    assert run(*base, "p.csv", "--overwrite").code == 0
    assert "exist" in refused(*base, "nowhere/p.csv")


def test_bad_input(
    refused: Refused, finished: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, images = str(finished / "adapter"), str(photos)
    (tmp_path / "none").mkdir()
    with monkeypatch.context() as patched:  # images are found before a model is loaded
        patched.setattr("randlora_pl.tasks.load_tasks", lambda *_: pytest.fail("a model was loaded"))
        message = refused("predict", "--adapter", adapter, "--images", "nowhere")
        assert "nowhere does not exist. Give image files, or folders with images" in message
        assert "has no images" in refused("predict", "--adapter", adapter, "--images", "none")
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:60])
    message = refused("predict", "--adapter", adapter, "--images", images)
    assert "broken.png" in message and "--images" in message
    assert "RUN/adapter" in refused("predict", "--adapter", str(photos), "--images", images)
    assert "--top-k" in refused("predict", "--adapter", adapter, "--images", images, "--top-k", "0")


def test_unreadable_images_can_be_skipped(run: Run, finished: Path, second: Path, photos: Path, tmp_path: Path) -> None:
    base = ("predict", "--adapter", str(finished / "adapter"), "--images", str(photos), "--batch-size", "1")
    assert run(*base, "--output", "whole.csv").code == 0
    (photos / "aa-broken.png").write_bytes(b"no image")
    Image.new("RGB", (9, 9)).save(photos / "large.png")
    refused = run(*base, "--output", "rest.csv", "--max-pixels", "80")
    assert refused.code == 2 and "broken.png" in refused.err
    result = run(*base, "--output", "rest.csv", "--on-error", "skip", "--max-pixels", "80")  # the others are 8 x 8
    assert result.code == 0 and "skipped: 2" in result.out and "large.png" in result.err
    assert (tmp_path / "rest.csv").read_text() == (tmp_path / "whole.csv").read_text()
    named = (f"one={finished / 'adapter'}", f"two={second}")
    result = run("predict", "--images", str(photos), "--output", "p.csv", "--adapter", *named, "--on-error", "skip")
    assert "p.csv: 4 images, 2 adapters (one, two)" in result.out and "skipped: 1" in result.out


@pytest.mark.parametrize("place", ["/proc/p.csv", f"{'n' * 300}.csv"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    refused: Refused, finished: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr("randlora_pl.commands.predict.classify", lambda *_: pytest.fail("it has begun"))
    line = refused("predict", "--adapter", str(finished / "adapter"), "--images", str(photos), "--output", place)
    assert place[-40:] in line and ".part" not in line


def test_predictions_of_a_full_disk_are_kept(
    run: Run, finished: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "kept"))
    monkeypatch.setattr(os, "replace", fail := unittest.mock.Mock(side_effect=OSError(errno.ENOSPC, "no room")))
    monkeypatch.setattr(Path, "replace", fail)
    result = run("predict", "--adapter", str(finished / "adapter"), "--images", str(photos), "--output", "p.csv")
    assert result.code == 2 and len(result.err.strip().splitlines()) == 1
    (kept,) = (tmp_path / "kept").iterdir()
    assert str(kept) in result.err and len(kept.read_text().splitlines()) == 1 + 3
    assert not list(tmp_path.glob("*.csv")) and not list(tmp_path.glob("*.part"))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    for name, said in (("tpu", "--device tpu"), ("cpu:x", "cpu:x is "), ("cpu:7", "cpu:7 is "), ("cuda:7", "cuda:1")):
        with pytest.raises(UserError, match=said):
            pick_device(name)


# Several adapters


def variant(source: Path, folder: Path, by: float = 0.05, frame: dict[str, Any] | None = None) -> Path:
    task = load_task(source)
    task.finish_evaluation()
    shake(task, by)
    return task.save(folder, {} if frame is None else {"frame": frame})


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture
def second(finished: Path, tmp_path: Path) -> Path:
    return variant(finished / "adapter", tmp_path / "runs" / "second" / "adapter")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Places of the images that are decoded from now on."""
    seen: list[int] = []
    load = FileImages.load

    def counted(self: FileImages, row: int, *args: Any, **options: Any) -> Any:
        seen.append(row)
        return load(self, row, *args, **options)

    monkeypatch.setattr(FileImages, "load", counted)
    return seen


@pytest.mark.parametrize(
    ("batch", "held"), marked(product(["1", "2", "64"], [0, 1 << 28]), lambda row: row == ("2", 1 << 28))
)
def test_several_adapters_predict_in_one_pass_as_each_alone(
    run: Run, finished: Path, second: Path, photos: Path, tmp_path: Path,
    decoded: list[int], monkeypatch: pytest.MonkeyPatch, batch: str, held: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("randlora_pl.commands.predict._HELD", held)
    base = ("predict", "--images", str(photos), "--batch-size", batch, "--top-k", "3")
    first = finished / "adapter"
    alone = [read(run(*base, "--output", "-", "--adapter", str(path)).out) for path in (first, second)]
    assert alone[0] != alone[1]
    decoded.clear()
    named = ("--adapter", f"one={first}", f"two={second}", "--adapter", f"three={first}")
    result = run(*base, "--output", "p.csv", *named)
    assert result.code == 0, result.err
    assert sorted(decoded) == [0, 1, 2]
    assert "p.csv: 3 images, 3 adapters (one, two, three), the best 3 classes of each" in result.out
    text = (tmp_path / "p.csv").read_text()
    assert text.startswith("image,adapter,class,probability,class_2,probability_2,class_3,probability_3\n")
    rows = read(text)
    assert [row["image"] for row in rows] == [row["image"] for row in alone[0] for _ in range(3)]
    assert [row.pop("adapter") for row in rows] == ["one", "two", "three"] * 3
    for place, expected in enumerate((alone[0], alone[1], alone[0])):
        assert rows[place::3] == expected
    both = ("--adapter", f"a={first}", f"b={second}", "--weights", "0", "1")
    result = run(*base, "--output", "sum.csv", *both)
    assert "sum.csv: 3 images, 0 a + 1 b, the best 3 classes of each" in result.out
    assert read((tmp_path / "sum.csv").read_text()) == alone[1]


@pytest.mark.slow
def test_adapters_of_other_classes_bases_and_frames(
    run: Run, finished: Path, photos: Path, tmp_path: Path, decoded: list[int]
) -> None:
    """A classifier of three classes on other weights, and a preprocessing of its own for one of the digits'."""
    task = LinearHeadTask(name="test_vit.r160_in1k", pretrained="random", img_size=32)
    task.set_classes(["cat", "dog", "cow"], [])
    task.adapt()
    task.save(tmp_path / "animals.safetensors", {"frame": asdict(ImageSpec(32, (0.5,) * 3, (0.5,) * 3, "bicubic"))})
    frame = asdict(ImageSpec(32, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), "bilinear"))
    other = variant(finished / "adapter", tmp_path / "other", by=0.0, frame=frame)
    paths = [finished / "adapter", tmp_path / "animals.safetensors", other]
    base = ("predict", "--images", str(photos), "--output", "-", "--top-k", "4")
    alone = [read(run(*base, "--adapter", str(path)).out) for path in paths]
    assert alone[0] != alone[2]
    decoded.clear()
    result = run(*base, "--adapter", *(f"a{number}={path}" for number, path in enumerate(paths)))
    assert result.code == 0, result.err
    assert sorted(decoded) == [0, 0, 1, 1, 2, 2]  # two ways of preparing an image: the first two models agree
    rows = read(result.out)
    assert [row.pop("adapter") for row in rows] == ["a0", "a1", "a2"] * 3
    assert rows[0::3] == alone[0] and rows[2::3] == alone[2]
    blank = {"class_4": "", "probability_4": ""}
    assert rows[1::3] == [row | blank for row in alone[1]]


@in_one_item(
    ("paths", "names"),
    [
        (["runs/quickstart/T/adapter"], ["adapter"]),
        (["runs/quickstart/T1/adapter", "runs/quickstart/T2/adapter"], ["T1", "T2"]),
        (["runs/cars/T/adapter", "runs/pets/T/adapter"], ["cars", "pets"]),
        (["runs/cars/T1/adapter", "runs/pets/T2/adapter", "runs/cars/T3/adapter"], ["cars/T1", "pets/T2", "cars/T3"]),
        (["runs/cars/T/adapter", "runs/cars/T/adapter-best"], ["adapter", "adapter-best"]),
        (["a/cars.safetensors", "b/pets.safetensors"], ["a/cars", "b/pets"]),
        (["cars.safetensors", "pets.safetensors"], ["cars", "pets"]),
        (["runs/x", "runs/x/y"], ["x", "y"]),
        (["/runs/cars/adapter", "pets/adapter"], ["/runs/cars", "pets"]),
        (["mine=runs/cars/adapter", "runs/pets/adapter"], ["mine", "pets"]),
        (["runs/a=1/adapter", "runs/a=2/adapter"], ["a=1", "a=2"]),
        (["rate=1", "mine=2"], ["rate=1", "mine"]),  # the first is a folder
    ],
)
def test_adapters_are_called_by_what_tells_them_apart(
    paths: list[str], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rate=1").mkdir()
    found = name_adapters(paths)
    assert list(found) == names
    assert list(map(str, found.values())) == [path.removeprefix("mine=") for path in paths]


def test_several_adapters_that_are_refused(
    refused: Refused, finished: Path, second: Path, photos: Path, tmp_path: Path
) -> None:
    first = str(finished / "adapter")
    base = ("predict", "--images", str(photos), "--adapter")
    assert "two called adapter" in refused(*base, first, first)
    assert "two called x" in refused(*base, f"x={first}", f"x={second}")
    assert "NAME=FOLDER" in refused(*base, first, "=x")
    assert "nowhere" in refused(*base, first, "pets=nowhere")
    assert "--weights" in refused(*base, first, str(second), "--weights", "1")
    assert "--weights" in refused(*base, first, str(second), "--weights", "1", "nan")
    (second / "adapter.safetensors").write_bytes((second / "adapter.safetensors").read_bytes()[:-1] + b"!")
    message = refused(*base, f"a={first}", f"b={second}")
    assert str(second) in message and "damaged" in message


@pytest.mark.parametrize("missing", ["classnames", "arguments", "templates"])
def test_an_adapter_without_what_a_task_saves_is_refused(
    refused: Refused, finished: Path, photos: Path, tmp_path: Path, missing: str
) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(finished / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["sha256"], config["metadata"][missing]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for words in (
        ("predict", "--adapter", "cut", "--images", "photos"),
        ("adapter", "info", "cut"),
        ("adapter", "merge", "cut", "--output", "m.pt"),
        ("adapter", "export", "cut", "--to", "adapter", "--output", "copy"),
        ("adapter", "export", "cut", "--to", "torch", "--output", "deep/m.pt2"),
    ):
        assert missing in refused(*words)


def test_prompts_name_other_classes(run: Run, refused: Refused, finished: Path, photos: Path, tmp_path: Path) -> None:
    task = PromptTask("tiny", "random", prompts=CoOp(length=2, words=None), head=DePT())
    task.set_classes(["cat", "dog", "cow"], [])
    task.adapt()
    folder, names = task.save(tmp_path / "prompts"), tmp_path / "names.txt"
    names.write_text("owl\n\nfox \n", encoding="utf-8-sig")
    words = ("predict", "--images", str(photos), "--output", "-", "--classnames", str(names), "--adapter")
    page = run(*words, str(folder))
    rows = list(csv.DictReader(page.out.splitlines()))
    assert rows and {row["class"] for row in rows} <= {"owl", "fox"}
    assert "only a PromptTask can predict other classes" in refused(*words, str(finished))
    names.write_text("owl\nowl")
    assert "has 2 names: give two or more, one per line, each once" in refused(*words, str(folder))
    names.unlink()
    assert "cannot be read: No such file" in refused(*words, str(folder))


@pytest.mark.parametrize("text", ["a\rb", "a\nb", "a\r\nb", "a\r", "\r\n", 'say "no", so', "a\u2028b"])
def test_texts_with_line_ends_come_back_whole(text: str) -> None:
    """A lone carriage return ends a line for whoever reads CSV files, and so stands in quotes."""
    found = PredictionTable(["one"], "prompts", ["prompt"], [[text], ["b"]], ["written"], "")
    found.add("one", 1, ["plain"])
    found.add("one", 0, [text])
    rows = list(csv.reader(io.StringIO(found.csv(), newline="")))
    assert rows == [["prompt", "written"], [text, text], ["b", "plain"]]
    assert found.csv().endswith("b,plain\n")


def test_cells_are_no_formulas_and_fit_into_a_file() -> None:
    text = csv_text([["=1+1", -1, os.fsdecode(b"\xff")]])
    assert text == "'=1+1,-1,\\udcff\n" and text.encode("utf-8")
