"""Evaluation gives the pixels of the libraries' own transforms, for decoded RGB pictures of any shape."""

import functools
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from timm.data import create_transform

from randlora_pl.data.transforms import eval_batch
from randlora_pl.models.weights import open_clip_spec, timm_spec
from randlora_pl.utils.image_spec import ImageSpec
from tests.support.products import in_one_item

SHAPES = [  # height, width
    (300, 900), (900, 300), (375, 500), (1, 1), (1, 40), (40, 1), (2, 3), (32, 32), (31, 33), (33, 64), (64, 33),
    (57, 101), (101, 57), (97, 31), (224, 224), (36, 37), (255, 256), (20, 230), (230, 20), (63, 65),
]  # fmt: skip
"""20 odd shapes: wide, tall, tiny, single rows, and halves that rounding decides."""
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@functools.cache
def picture(height: int, width: int) -> np.ndarray:
    """Hard edges beside noise, where resizers differ most."""
    rows, columns = np.mgrid[:height, :width]
    edges = ((columns // 7 + rows // 5) % 2 * 255)[..., None].repeat(3, 2)
    noise = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3))
    return np.where((columns < width // 2)[..., None], edges, noise).astype(np.uint8)


def check(spec: ImageSpec, theirs: Any, shapes: list[tuple[int, int]], bound: float = 0.01) -> None:
    """Compare with a library's transform to rounding errors of float32, a hundredth of a gray level."""
    for height, width in shapes:
        pixels = picture(height, width)
        expected = theirs(Image.fromarray(pixels))
        found = eval_batch([torch.from_numpy(pixels)], ImageSpec(**asdict(spec)))[0]
        levels = (found - expected).abs() * 255 * torch.tensor(spec.std).view(3, 1, 1)
        assert levels.max() < bound, (height, width)


@in_one_item("interpolation", ["bicubic", "bilinear"])
@in_one_item("mode", ["shortest", "longest", "squash"])
def test_pixels_are_open_clips(mode: str, interpolation: str) -> None:
    size, fill = (32, 0) if interpolation == "bicubic" else (37, 114)
    values = {"mean": MEAN, "std": STD, "interpolation": interpolation, "resize_mode": mode, "fill_color": fill}
    theirs = image_transform_v2(PreprocessCfg(size, **values), is_train=False)
    possible = [(h, w) for h, w in SHAPES if mode != "longest" or 2 * size * min(h, w) > max(h, w)]  # not 0 pixels
    check(open_clip_spec(values, size, "it"), theirs, possible)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pictures_longer_than_64_times_their_width_differ_by_one_level(interpolation: str) -> None:
    values = {"mean": MEAN, "std": STD, "interpolation": interpolation}
    theirs = image_transform_v2(PreprocessCfg(32, **values), is_train=False)
    long = [(700, 10), (10, 700), (300, 2), (5000, 7), (7, 5000), (8000, 70), (3000, 40)]
    check(open_clip_spec(values, 32, "it"), theirs, long, bound=1.01)


@in_one_item("crop_pct", [0.875, 0.9, 1.0, 1.15])
@in_one_item("mode", ["center", "border", "squash"])
def test_pixels_are_timms(mode: str, crop_pct: float) -> None:
    size, interpolation = (37, "bilinear") if crop_pct == 0.9 else (32, "bicubic")
    values = {"mean": MEAN, "std": STD, "interpolation": interpolation, "crop_mode": mode, "crop_pct": crop_pct}
    spec, theirs = timm_spec(values, size, "it"), create_transform(size, is_training=False, **values)
    possible = [(h, w) for h, w in SHAPES if mode != "border" or 2 * spec.length * min(h, w) > max(h, w)]
    check(spec, theirs, possible)


def test_a_row_of_pixels_that_open_clip_refuses_fills_one_row() -> None:
    frame = ImageSpec(32, resize="longest", fill=(0, 0, 255))
    found = eval_batch([torch.full((1, 900, 3), 255, dtype=torch.uint8)], frame)[0]
    assert int((found[0] == found[0].max()).all(1).sum()) == 1


def test_gray_pictures_are_filled_with_a_color() -> None:
    gray = torch.from_numpy(picture(9, 30)[..., :1].copy())
    frame = ImageSpec(16, resize="longest", fill=(10, 20, 30))
    assert torch.equal(eval_batch([gray], frame), eval_batch([gray.expand(-1, -1, 3).contiguous()], frame))
