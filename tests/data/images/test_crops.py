"""Crops of a batch at once, against torchvision on each image."""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from randlora_pl.data.transforms import _crop_and_resize, _resize_weights, finish, train_pixels
from randlora_pl.utils.device import choose_as_on_cuda
from randlora_pl.utils.image_spec import INTERPOLATIONS, ImageSpec


def reference(images: Tensor, boxes: Tensor, size: int, interpolation: str) -> Tensor:
    mode = InterpolationMode(interpolation)
    cut = [image[:, t : t + h, left : left + w] for image, (t, left, h, w) in zip(images, boxes.tolist(), strict=True)]
    return torch.stack([v2.resize_image(each, [size, size], mode, antialias=True) for each in cut])


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@st.composite
def cases(draw: Any) -> tuple[Tensor, Tensor, int, str]:
    height, width = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    count = draw(st.integers(1, 4))
    boxes = []
    for _ in range(count):
        tall, wide = draw(st.integers(1, height)), draw(st.integers(1, width))
        boxes.append([draw(st.integers(0, height - tall)), draw(st.integers(0, width - wide)), tall, wide])
    images = noise(draw(st.integers(0, 99)), count, draw(st.sampled_from([1, 3])), height, width)
    size = draw(st.integers(2, 64))  # PyTorch's own kernel fails to make one pixel of a column of colors
    return images, torch.tensor(boxes), size, draw(st.sampled_from(INTERPOLATIONS))


@given(cases())
def test_crops_are_those_of_torchvision(case: tuple[Tensor, Tensor, int, str]) -> None:
    images, boxes, size, interpolation = case
    found, wanted = _crop_and_resize(*case), reference(*case)
    assert found.shape == wanted.shape and found.dtype == torch.uint8
    assert int((found.int() - wanted.int()).abs().max()) <= 2
    weights = _resize_weights(boxes, max(images.shape[-2:]), size, interpolation)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, len(boxes), size))


def test_nearly_all_gray_levels_are_the_same() -> None:
    """Closer than torchvision on a GPU, which does not round between the two directions."""
    coarse = 255 * torch.rand(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, size=(64, 64), mode="bicubic").clamp(0, 255).to(torch.uint8)
    boxes = torch.tensor([[i, 2 * i, 48 - 2 * i, 32 - i] for i in range(16)])
    for interpolation, least in (("bicubic", 0.99), ("bilinear", 0.985)):
        for size in (32, 224):
            found = _crop_and_resize(images, boxes, size, interpolation)
            same = found == (wanted := reference(images, boxes, size, interpolation))
            floats = reference(images.float(), boxes, size, interpolation).round().clamp(0, 255)
            assert max(least, float((floats == wanted).float().mean())) < same.float().mean()


class Kernels(TorchDispatchMode):
    """Counts operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storages = [arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)]
        in_place = str(func).partition(".default")[0].endswith("_") or "_." in str(func)
        view = isinstance(result, Tensor) and result.untyped_storage().data_ptr() in storages
        self.seen[str(func)] += in_place or not (view or "split" in str(func) or "unbind" in str(func))
        return result


def test_kernels_of_a_batch_do_not_grow_with_it() -> None:
    frame = ImageSpec(32, (0.5,) * 3, (0.5,) * 3, "bicubic")
    counted = []
    for count in (2, 64):
        images = list(noise(1, count, 20, 20, 3))
        batch = train_pixels(images, torch.arange(count), 0, frame, (0.3, 1.0), False, True)
        with choose_as_on_cuda(), Kernels() as kernels:
            late = _crop_and_resize(batch["image"], batch["crop"], 32, "bicubic")
        counted.append(kernels.seen.total())
        now = train_pixels(images, torch.arange(count), 0, frame, (0.3, 1.0), False, False)
        assert int((late.int() - now["image"].int()).abs().max()) <= 2
        with choose_as_on_cuda():
            whole = finish({"image": batch["image"], "crop": batch["crop"], "mirror": batch["mirror"]}, frame)
        assert whole["image"].shape == (count, 3, 32, 32)
    assert counted[0] == counted[1] <= 42, kernels.seen


def test_large_images_are_done_in_parts(monkeypatch: Any) -> None:
    case = noise(2, 5, 3, 30, 40), torch.tensor([[1, 2, 20, 30]] * 5), 16, "bilinear"
    whole = _crop_and_resize(*case)
    monkeypatch.setattr("randlora_pl.data.transforms._AT_ONCE", 3 * 30 * 40 * 2)
    assert torch.equal(_crop_and_resize(*case), whole)
