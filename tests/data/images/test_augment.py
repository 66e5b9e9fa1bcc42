"""RandAugment, MixUp and CutMix: what is done depends on the seed and the position in the sample order alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from randlora_pl.data import ImageData
from randlora_pl.data.loader import Batch, Loader
from randlora_pl.data.transforms import Augment, _mixed
from randlora_pl.utils import rng

ALL: dict[str, Any] = {"randaugment": 9, "mixup": 0.3, "cutmix": 1.0, "balance": "weights"}


def loader(workers: int = 0, start: int = 0, **options: Any) -> Loader:
    """Training batches of digits, as a run hands them over to the task."""
    data = ImageData(
        **({"fraction": 0.1, "steps": 4, "batch_size": 9, "image_size": 16, "num_workers": workers} | ALL | options)
    )
    data.setup("fit")
    whole = data.train_dataloader()
    return Loader(whole.batches, start, workers)


def assert_same(ones: list[Batch], others: list[Batch]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items() if isinstance(value, Tensor))


def test_batches_are_the_same_for_any_workers_and_any_start() -> None:
    whole = list(loader())
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    assert_same(whole, list(loader(workers=2)))
    assert_same(whole[2:], list(loader(start=2)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(whole[0]["image"], next(iter(loader(seed=1)))["image"])


def test_an_images_operations_depend_on_its_draw() -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 20, 20), dtype=np.uint8))
    found = [Augment(randaugment=15).changed(image, draw, 3) for draw in range(20)]
    assert all(torch.equal(Augment(randaugment=15).changed(image, draw, 3), one) for draw, one in enumerate(found))
    assert len({one.numpy().tobytes() for one in found}) > 10


@pytest.mark.parametrize(("kind", "theirs"), [("mixup", v2.MixUp), ("cutmix", v2.CutMix)])
def test_blending_is_torchvisions(kind: str, theirs: type) -> None:
    images, labels, positions = torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 2, 1, 0]), torch.arange(7, 12)
    weights = torch.tensor([0.5, 0.5, 0.0, 0.5, 0.5])  # the third is unreadable
    mix = Augment(**{kind: 1.0}).mixing(positions, weights, 1, 4)["mix"]
    found = _mixed({"image": images, "label": labels, "weight": weights}, mix)
    rows = torch.tensor([0, 1, 3, 4])
    with rng.seeded(mix["seed"]):
        expected, targets = theirs(alpha=1.0, num_classes=4)(images[rows], labels[rows])
    torch.testing.assert_close(found["image"][rows], expected)
    torch.testing.assert_close(found["target"][rows], targets)
    torch.testing.assert_close(found["weight"], weights)
    assert torch.equal(found["image"][2], images[2]) and found["target"][2].tolist() == [0, 0, 1, 0]


def test_one_of_both_is_chosen_for_each_micro_batch() -> None:
    both = Augment(mixup=0.2, cutmix=1.0)
    kinds = [both.mixing(torch.tensor([draw]), torch.ones(1), 0, 2)["mix"]["kind"] for draw in range(200)]
    assert 70 < kinds.count("mixup") < 130
    assert both.mixing(torch.tensor([0]), torch.zeros(1), 0, 2)["mix"]["rows"] == []
