import csv
import errno
import io
import json
import os
import shutil
import tempfile
import unittest.mock
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from randlora_pl.adapters import FullFineTuning
from randlora_pl.commands.common import pick_device
from randlora_pl.commands.predict import name_adapters
from randlora_pl.data import ImageData, open_images
from randlora_pl.data.sources import FileImages
from randlora_pl.prompts import CoOp
from randlora_pl.tasks import DePT, LinearHeadTask, PromptTask, load_task, load_tasks, weighted_task
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec
from tests.support.cli import Run
from tests.support.products import in_one_item, marked


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
    from randlora_pl.serving import ServerOptions, app

    monkeypatch.setattr(app, "trust_the_limit", lambda: None)  # of the worker's process, as are its threads
    options = ServerOptions(adapter=finished / "adapter", precision="bf16", workers=64)
    served = app.ClassifierAPI(options, 1 << 20)
    served._build("cpu")
    loader, _ = open_images([photos], served.frame)
    shares = served._probabilities(torch.cat([batch["image"] for batch in loader]))
    expected = [float(row["probability"]) for row in half]  # products of another batch size round differently
    assert shares.max(1).values.tolist() == pytest.approx(expected, abs=2e-3)


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
    assert "exist" in refused(*base, "nowhere/p.csv")


def test_images_are_found_before_a_model_is_loaded(
    refused: Callable[..., str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(files: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("randlora_pl.tasks.load_tasks", loaded)
    base = ("predict", "--adapter", str(finished / "adapter"), "--images")
    assert "nowhere does not exist. Name image files, or folders with images" in refused(*base, "nowhere")
    (tmp_path / "none").mkdir()
    assert "has no images" in refused(*base, "none")


def test_bad_input(refused: Callable[..., str], finished: Path, photos: Path, tmp_path: Path) -> None:
    adapter, images = str(finished / "adapter"), str(photos)
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:60])
    message = refused("predict", "--adapter", adapter, "--images", images)
    assert "broken.png" in message and "--images" in message
    assert "exist" in refused("predict", "--adapter", adapter, "--images", "nowhere.png")
    assert "RUN/adapter" in refused("predict", "--adapter", str(photos), "--images", images)
    assert "required: --adapter" in refused("predict", "--images", images)
    assert "'--images'" in refused("predict", "--adapter", adapter, "--images", images, "--imagees", "x")
    assert "--top-k" in refused("predict", "--adapter", adapter, "--images", images, "--top-k", "0")


def test_unreadable_images_can_be_skipped(run: Run, finished: Path, photos: Path, tmp_path: Path) -> None:
    base = ("predict", "--adapter", str(finished / "adapter"), "--images", str(photos), "--batch-size", "1")
    assert run(*base, "--output", "whole.csv").code == 0
    (photos / "aa-broken.png").write_bytes(b"no image")
    result = run(*base, "--output", "rest.csv", "--on-error", "skip")
    assert result.code == 0 and "skipped: 1" in result.out
    assert (tmp_path / "rest.csv").read_text() == (tmp_path / "whole.csv").read_text()


def test_pipes_and_large_images_in_a_folder(run: Run, finished: Path, photos: Path) -> None:
    os.mkfifo(photos / "pipe.png")
    Image.new("RGB", (9, 9)).save(photos / "large.png")
    base = ("predict", "--adapter", str(finished / "adapter"), "--images", str(photos), "--output", "-")
    skipped = run(*base, "--on-error", "skip", "--max-pixels", "80")
    assert skipped.code == 0 and len(skipped.out.splitlines()) == 1 + 3  # 8 x 8 pixels each
    assert "pipe.png" in skipped.err and "large.png" in skipped.err
    refused = run(*base[:3], "--images", str(photos / "large.png"), "--output", "-", "--max-pixels", "80")
    assert refused.code == 2 and "--max-pixels" in refused.err
    assert run(*base[:3], "--images", str(photos / "large.png"), "--output", "-").code == 0


@pytest.mark.parametrize("place", ["/proc/p.csv", f"{'n' * 300}.csv"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    refused: Callable[..., str], finished: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, place: str
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


def test_names_that_are_not_utf8_are_spelled_out(run: Run, finished: Path, photos: Path, tmp_path: Path) -> None:
    odd = photos / os.fsdecode(b"\xff.png")
    (photos / "a.png").rename(odd)
    base = ("predict", "--adapter", str(finished / "adapter"), "--images", str(odd), "--output")
    assert run(*base, "p.csv").code == 0
    assert r"\udcff.png" in (tmp_path / "p.csv").read_text(encoding="utf-8")


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
    with pytest.raises(UserError, match="--device"):
        pick_device("tpu")
    for name in ("cpu:x", "cpu:7"):
        with pytest.raises(UserError, match=f"--device {name} is "):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="cuda:1"):
        pick_device("cuda:7")


# Several adapters


def variant(source: Path, folder: Path, by: float = 0.05, frame: dict[str, Any] | None = None) -> Path:
    """Another adapter of the same base model and classes."""
    task = load_task(source)
    task.finish_evaluation()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))
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


@pytest.mark.slow
def test_adapters_of_other_classes_bases_and_frames(
    run: Run, finished: Path, photos: Path, tmp_path: Path, decoded: list[int]
) -> None:
    """A classifier of three classes on other weights, and a preprocessing of its own for one of the digits'."""
    task = LinearHeadTask(name="test_vit.r160_in1k", pretrained="random", img_size=32)
    task.set_classes(["cat", "dog", "cow"], [])
    task.configure_model()
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


@pytest.mark.slow
def test_weighted_sum_of_adapters(run: Run, finished: Path, second: Path, photos: Path, tmp_path: Path) -> None:
    first = finished / "adapter"
    base = ("predict", "--images", str(photos), "--output")
    alone = [read(run(*base, "-", "--adapter", str(path)).out) for path in (first, second)]
    both = ("--adapter", f"a={first}", f"b={second}", "--weights")
    assert read(run(*base, "-", *both, "1", "0").out) == alone[0]
    assert read(run(*base, "-", *both, "0", "1").out) == alone[1]
    result = run(*base, "p.csv", *both, "0.5", "-0.5")
    assert "p.csv: 3 images, 0.5 a + -0.5 b, the best 5 classes of each" in result.out
    task = weighted_task(load_tasks({"a": first, "b": second}), {"a": 0.5, "b": -0.5})
    loader, _ = open_images([photos], task.image_spec)
    with torch.no_grad():
        [shares] = [task.class_logits(batch["image"]).softmax(1) for batch in loader]
    rows = read((tmp_path / "p.csv").read_text())
    for row, expected in zip(rows, shares, strict=True):
        assert row["class"] == task.classnames[int(expected.argmax())]
        assert float(row["probability"]) == pytest.approx(float(expected.max()), abs=1e-5)


def test_unreadable_images_are_skipped_for_all_adapters(run: Run, finished: Path, second: Path, photos: Path) -> None:
    (photos / "aa-broken.png").write_bytes(b"no image")
    named = ("--adapter", f"one={finished / 'adapter'}", f"two={second}")
    result = run("predict", "--images", str(photos), "--output", "p.csv", *named, "--on-error", "skip")
    assert "p.csv: 3 images, 2 adapters (one, two)" in result.out and "skipped: 1" in result.out


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
    ],
)
def test_adapters_are_called_by_what_tells_them_apart(paths: list[str], names: list[str]) -> None:
    found = name_adapters(paths)
    assert list(found) == names
    assert list(map(str, found.values())) == [path.removeprefix("mine=") for path in paths]


def test_a_path_with_an_equals_sign_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    assert name_adapters(["lr=1", "lr=2"]) == {"lr=1": Path("lr=1"), "lr": Path("2")}


def test_several_adapters_that_are_refused(
    refused: Callable[..., str], finished: Path, second: Path, photos: Path, tmp_path: Path
) -> None:
    first = str(finished / "adapter")
    base = ("predict", "--images", str(photos), "--adapter")
    assert "two called adapter" in refused(*base, first, first)
    assert "two called x" in refused(*base, f"x={first}", f"x={second}")
    assert "NAME=FOLDER" in refused(*base, first, "=x")
    assert "nowhere" in refused(*base, first, "pets=nowhere")
    assert "--weights" in refused(*base, first, str(second), "--weights", "1")
    assert "--weights" in refused(*base, first, str(second), "--weights", "1", "nan")
    task = load_task(first)
    full = type(task)(**task.constructor() | {"targets": None}, adapter=FullFineTuning())
    full.set_classes(task.classnames, ["a {}"])
    full.configure_model()
    full.save(tmp_path / "full")
    message = refused(*base, f"a={first}", f"full={tmp_path / 'full'}", "--weights", "1", "1")
    assert "FullFineTuning" in message and "randlora-pl adapter add" in message
    (second / "adapter.safetensors").write_bytes((second / "adapter.safetensors").read_bytes()[:-1] + b"!")
    message = refused(*base, f"a={first}", f"b={second}")
    assert str(second) in message and "damaged" in message


@pytest.mark.parametrize("missing", ["classnames", "arguments", "templates"])
def test_an_adapter_without_what_a_task_saves_is_refused(
    refused: Callable[..., str], finished: Path, photos: Path, tmp_path: Path, missing: str
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
    ):
        assert missing in refused(*words)


def test_prompts_name_other_classes(
    run: Run, refused: Callable[..., str], finished: Path, photos: Path, tmp_path: Path
) -> None:
    task = PromptTask("tiny", "random", prompts=CoOp(length=2, words=None), head=DePT())
    task.set_classes(["cat", "dog", "cow"], [])
    task.configure_model()
    folder, names = task.save(tmp_path / "prompts"), tmp_path / "names.txt"
    names.write_text("owl\n\nfox \n", encoding="utf-8-sig")
    words = ("predict", "--images", str(photos), "--output", "-", "--classnames", str(names), "--adapter")
    page = run(*words, str(folder))
    rows = list(csv.DictReader(page.out.splitlines()))
    assert rows and {row["class"] for row in rows} <= {"owl", "fox"}
    assert "cannot name other classes, only a PromptTask can" in refused(*words, str(finished))
    names.write_text("owl\nowl")
    assert "has 2 names: give two or more, one per line, each once" in refused(*words, str(folder))
    names.unlink()
    assert "cannot be read: No such file" in refused(*words, str(folder))
