"""ImageNet's shifted test sets, in tiny copies of their folders."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from randlora_pl.data import ImageData
from randlora_pl.data.catalog import ROWS, find
from randlora_pl.data.install import check
from randlora_pl.data.readers import read
from randlora_pl.utils.errors import UserError
from tests.data.readers.pictures import Writer, known, label_of
from tests.support.cli import Run
from tests.support.products import in_one_item

HOMES = {
    "imagenet_v2": "imagenetv2/imagenetv2-matched-frequency-format-val",
    "imagenet_sketch": "imagenet-sketch/images",
    "imagenet_a": "imagenet-adversarial/imagenet-a",
    "imagenet_r": "imagenet-rendition/imagenet-r",
}


def wnids_of(name: str) -> list[str]:
    """The class folders that a published set has, from timm's lists."""
    if name in ("imagenet_v2", "imagenet_sketch"):
        return known("imagenet")
    spec = importlib.util.find_spec("timm")
    assert spec is not None and spec.origin is not None
    return (Path(spec.origin).parent / f"data/_info/{name}_synsets.txt").read_text().split()


def write_shift(root: Path, name: str) -> None:
    """Write an image of each class, whose colour is the label in ImageNet, and a stray file."""
    write, every = Writer(), known("imagenet")
    for wnid in wnids_of(name):
        label = every.index(wnid)
        write(root / HOMES[name] / (str(label) if name == "imagenet_v2" else wnid) / f"{label}.jpeg", label)
    (root / HOMES[name] / "README.txt").write_text("200 classes")


def test_the_rows() -> None:
    assert [row.name for row in ROWS if row.trains_on] == list(HOMES)
    counts = {name: (find(name).classes, find(name).counts) for name in HOMES}
    sizes = {"imagenet_v2": (1000, 10_000), "imagenet_sketch": (1000, 50_889)}
    sizes |= {"imagenet_a": (200, 7_500), "imagenet_r": (200, 30_000)}
    assert counts == {name: (classes, {"test": images}) for name, (classes, images) in sizes.items()}
    assert all(find(name).templates == find("imagenet").templates for name in HOMES)


@in_one_item("name", HOMES)
def test_labels_are_names_of_imagenet(tmp_path: Path, name: str) -> None:
    write_shift(tmp_path, name)
    row, imagenet = find(name), find("imagenet")
    data = ImageData(dataset=name, root=str(tmp_path), image_size=16)
    data.setup("test")
    wnids, samples = wnids_of(name), data.samples("test")
    assert data.classnames == [imagenet.classnames[known("imagenet").index(wnid)] for wnid in sorted(wnids)]
    assert np.bincount(samples.labels).tolist() == [1] * len(wnids)
    for label, number in list(zip(samples.labels.tolist(), samples.rows.tolist(), strict=True))[:40]:
        pixels = samples.images.load(number)
        shown = label_of(pixels[pixels.shape[0] // 2, pixels.shape[1] // 2])
        assert shown is None or imagenet.classnames[shown] == data.classnames[label]
    assert read(row, tmp_path, "train") is read(row, tmp_path, "val") is None
    for stage in ("fit", "validate", None):
        with pytest.raises(UserError, match=f"only. Train on imagenet, .*test --adapter RUN --data.dataset {name}$"):
            ImageData(dataset=name, root=str(tmp_path)).setup(stage)
    (problem,) = check(row, tmp_path, 2).problems
    assert problem.what == f"{row.title}: {len(wnids):,} test images, expected {row.counts['test']:,}"


def test_folders_that_are_none_or_lack(tmp_path: Path) -> None:
    write_shift(tmp_path, "imagenet_a")
    home = tmp_path / HOMES["imagenet_a"]
    (home / "n99999999").mkdir()
    with pytest.raises(UserError, match="n99999999 is not one of its 200 classes"):
        read(find("imagenet_a"), tmp_path, "test")
    (home / "n99999999").rmdir()
    (home / "n01498041").rename(tmp_path / "n01498041")
    with pytest.raises(UserError, match=r"has 199 of 200 class folders\)"):
        read(find("imagenet_a"), tmp_path, "test")


def test_commands(run: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    write_shift(tmp_path / "sets", "imagenet_r")
    words = ["--data.dataset", "imagenet_r", "--data.root", "sets"]
    assert "ImageNet-R has test images only" in refused("fit", "--config", "quickstart", *words)
    result = run("data", "show", "imagenet_r", "--root", "sets")
    assert result.code == 0 and "Images: test 200. " in result.out and "4 test images of each" in result.out
    assert "200 test images, expected 30,000" in run("data", "check", "imagenet_r", "--root", "sets").out
