from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from randlora_pl.data.transforms import RATIO, _crop_boxes, eval_batch, normalize
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec
from tests.data.images.batches import train_batch

PLAIN = ImageSpec(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def photo(height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """A smooth image with some noise: resizers differ most on pure noise."""
    rows, columns = torch.linspace(0, 6, height)[:, None, None], torch.linspace(0, 5, width)[None, :, None]
    smooth = 110 * (rows.sin() * columns.cos() + 1) * torch.linspace(0.7, 1, channels)
    noise = rng.words(seed, "noise", torch.arange(height * width * channels)) % 32
    return (smooth + noise.view(height, width, channels)).clamp(0, 255).to(torch.uint8)


def boxes(positions: torch.Tensor, height: int, width: int, scale: tuple[float, float] = (0.5, 1.0)) -> np.ndarray:
    heights = np.full(len(positions), height, dtype=np.int64)
    return _crop_boxes(0, positions, heights, np.full_like(heights, width), scale)


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.05, 1), st.integers(0, 2**40))
def test_boxes_lie_inside(height: int, width: int, least: float, first: int) -> None:
    top, left, h, w = boxes(first + torch.arange(8), height, width, (least, 1.0)).T
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()


def test_boxes_have_the_protocols_area_ratio_and_place() -> None:
    found = boxes(torch.arange(20_000), 400, 400).astype(float)
    area, ratio = found[:, 2] * found[:, 3] / 400**2, found[:, 3] / found[:, 2]
    assert 0.49 < area.min() < 0.51 and 0.98 < area.max() <= 1
    assert ratio.min() > RATIO[0] - 0.01 and ratio.max() < RATIO[1] + 0.01
    assert abs(np.log(ratio).mean()) < 0.01
    room = found[:, 0] / np.maximum(400 - found[:, 2], 1)
    assert abs(room.mean() - 0.5) < 0.02 and room.min() < 0.01 and room.max() > 0.99


def test_boxes_agree_with_torchvisions_distribution() -> None:
    from torchvision.transforms import RandomResizedCrop

    image = torch.zeros(3, 60, 100)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array([RandomResizedCrop.get_params(image, [0.5, 1.0], list(RATIO)) for _ in range(4000)])
    ours = boxes(torch.arange(4000), 60, 100)
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.8
    assert np.abs(ours.std(0) - theirs.std(0)).max() < 0.8


@pytest.mark.parametrize(
    ("size", "expected"), [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10)), ((1, 1), (0, 0, 1, 1))]
)
def test_long_images_give_the_centre(size: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert np.array_equal(boxes(torch.arange(5), *size, scale=(1.0, 1.0)), np.tile(expected, (5, 1)))


def test_draws_do_not_depend_on_their_batch() -> None:
    images = [photo(20 + number, 30, seed=number) for number in range(6)]
    positions = torch.tensor([3, 5, 2**33, 7, 0, 1])
    whole = train_batch(images, positions, 1, PLAIN, (0.5, 1.0), True)
    for place in range(6):
        alone = train_batch(images[place : place + 1], positions[place : place + 1], 1, PLAIN, (0.5, 1.0), True)
        assert torch.equal(alone[0], whole[place])
    assert not torch.equal(train_batch(images, positions, 2, PLAIN, (0.5, 1.0), True), whole)


def test_flips_are_half_and_mirror() -> None:
    positions = torch.arange(10_000)
    mirrored = rng.words(0, "flip", positions) < 2**31
    assert abs(mirrored.float().mean().item() - 0.5) < 0.02
    images = [photo(16, 16)] * 20
    plain, flipped = (train_batch(images, positions[:20], 0, PLAIN, (1.0, 1.0), flip) for flip in (False, True))
    for place in range(20):
        expected = plain[place].flip(-1) if mirrored[place] else plain[place]
        assert torch.equal(flipped[place], expected)


def test_whole_crop_at_its_own_size_is_the_image() -> None:
    image = photo(16, 16)
    expected = image.permute(2, 0, 1).float() / 255
    for batch in (train_batch([image], torch.tensor([9]), 0, PLAIN, (1.0, 1.0), False), eval_batch([image], PLAIN)):
        torch.testing.assert_close(batch[0], expected, rtol=0, atol=1e-6)


def test_training_crop_is_torchvisions_on_pillow() -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import pil_to_tensor, resized_crop

    image, positions = photo(90, 120), torch.arange(6)
    found = train_batch([image] * 6, positions, 0, ImageSpec(32, PLAIN.mean, PLAIN.std), (0.5, 1.0), False)
    for place, box in enumerate(boxes(positions, 90, 120).tolist()):
        expected = resized_crop(Image.fromarray(image.numpy()), *box, [32, 32], InterpolationMode.BICUBIC)
        assert (found[place] * 255 - pil_to_tensor(expected)).abs().max() < 2.1


def test_grey_equals_rgb_of_the_same_grey() -> None:
    grey = photo(20, 30, channels=1)
    positions = torch.tensor([4])
    for frame in (ImageSpec(24), ImageSpec(12)):
        rgb = grey.expand(-1, -1, 3).contiguous()
        one, three = (train_batch([image], positions, 0, frame, (0.5, 1.0), True) for image in (grey, rgb))
        assert one.shape == three.shape == (1, 3, frame.size, frame.size) and one.is_contiguous()
        assert (one - three).abs().max() < 1.1 / 255 / min(frame.std)


def test_normalisation() -> None:
    frame = ImageSpec()
    batch = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2) * 10
    expected = (batch.float() / 255 - torch.tensor(frame.mean).view(3, 1, 1)) / torch.tensor(frame.std).view(3, 1, 1)
    torch.testing.assert_close(normalize(batch, frame), expected)
    assert torch.equal(normalize(batch[:, :1], frame), normalize(batch[:, :1].expand(-1, 3, -1, -1), frame))


def test_a_typed_mode_replaces_the_models_own() -> None:
    spec = ImageSpec(64, (0.1, 0.2, 1.0), resize="squash", crop_pct=0.9)
    assert ImageSpec.choose(spec, {"resize": "model"}) == ImageSpec.choose(spec, {}) == ImageSpec(**asdict(spec))
    for typed, resize, crop_pct, fill in [
        ("squash", "squash", 1, (0, 0, 0)),
        ("shortest", "shortest", 1, (0, 0, 0)),
        ("shortest:0.875", "shortest", 0.875, (0, 0, 0)),
        ("longest", "longest", 1, (26, 51, 255)),
    ]:
        found = ImageSpec.choose(spec, {"resize": typed})
        assert (found.resize, found.crop_pct, found.fill) == (resize, crop_pct, fill)
    padding = replace(spec, resize="longest", fill=(9, 9, 9))
    assert ImageSpec.choose(padding, {"resize": "longest"}).fill == (9, 9, 9)
    assert ImageSpec.choose(padding, {"resize": "squash"}).fill == (0, 0, 0)
    with pytest.raises(UserError, match=r"--data.resize: .* the crop_pct 20.0. For images of 16 pixels .* at most 16"):
        ImageSpec.choose(ImageSpec(16), {"resize": "squash:20"})  # no pixels would be left
