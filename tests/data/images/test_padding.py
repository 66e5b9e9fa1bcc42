"""Whole images on a square of one color."""

from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from randlora_pl.data import ImageData, open_images
from randlora_pl.data.transforms import _crop_boxes, _split_crop, eval_batch, finish, train_pixels
from randlora_pl.data.unlabelled import read_image
from randlora_pl.utils.image_spec import ImageSpec
from tests.data.images.batches import train_batch

FRAME = ImageSpec(32, mean=(0.4, 0.6, 0.8), resize="longest", fill=(102, 153, 204))  # zeros outside the image
side = st.integers(1, 200)


def picture(height: int, width: int, channels: int = 3) -> Tensor:
    """A bright image: every value is above the mean."""
    noise = np.random.default_rng(height).integers(200, 256, (height, width, channels), dtype=np.uint8)
    return torch.from_numpy(noise)


@given(side, side, st.integers(1, 64))
def test_the_longer_side_fills_the_frame(height: int, width: int, size: int) -> None:
    h, w = ImageSpec(size, resize="longest").resized(height, width)
    assert max(h, w) == size and abs(min(h, w) - size * min(height, width) / max(height, width)) <= 1


@given(side, side, st.floats(0.05, 1))
def test_crops_of_the_square_are_never_empty(height: int, width: int, least: float) -> None:
    sizes = np.full(8, height), np.full(8, width)
    for box in _crop_boxes(0, torch.arange(8), *sizes, (least, 1.0), pad=True).tolist():
        (top, left, h, w), (upper, first, tall, wide) = _split_crop(height, width, box, 32)
        assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width and min(h, w, tall, wide) >= 1
        assert 0 <= upper <= upper + tall <= 32 and 0 <= first <= first + wide <= 32
        assert h in (height, box[2]) and w in (width, box[3])  # no padding beside a cut edge


def test_left_to_the_device_or_not_gives_the_same_bits() -> None:
    images, positions = [picture(20, 50)] * 6, torch.arange(6)
    own = train_pixels(images, positions, 0, FRAME, (0.5, 1.0), True, late=True)
    assert torch.equal(finish(own, FRAME)["image"], train_batch(images, positions, 0, FRAME, (0.5, 1.0), True))


def test_training_crops_mirror_their_padding() -> None:
    images, positions = [picture(10, 50)] * 40, torch.arange(40)
    plain, turned = (train_batch(images, positions, 0, FRAME, (0.5, 1.0), flip) for flip in (False, True))
    assert all(torch.equal(b, a) or torch.equal(b, a.flip(-1)) for a, b in zip(plain, turned, strict=True))
    shown = (plain.abs() > 1e-6).any(1).flatten(1).sum(1)
    assert (shown > 0).all() and (shown < 32 * 32 / 2).all()


def test_files_are_prepared_alike_for_validation_prediction_and_serving(tmp_path: Path) -> None:
    """Large JPEGs are decoded at a reduced size in each."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(6):
            noise = np.random.default_rng(number).integers(0, 256, (6, 24, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((1600, 400)).save(tmp_path / name / f"{number}.jpg")
    data = ImageData(dataset="folder", root=str(tmp_path), resize="longest", image_size=32, eval_batch_size=99)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    files = [Path(data.samples("test").images.name(row)) for row in data.samples("test").rows]
    loader, _ = open_images(files, data.frame)
    assert torch.equal(next(iter(loader))["image"], batch["image"])
    assert torch.equal(read_image(files[0].read_bytes(), "it", data.frame), batch["image"][:1])
    assert "longer side to 32" in data.summary_lines(data.summary())["images"]
    exact = eval_batch([torch.from_numpy(np.array(Image.open(files[0])))], data.frame)
    assert (batch["image"][0] - exact[0]).abs().max() < 0.1
    assert (batch["image"][0].abs() > 0.01).any(0).sum() <= 8 * 32  # the rest has the mean color, rounded
