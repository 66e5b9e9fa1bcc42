"""A fixed choice of images."""

import numpy as np
import pytest
import torch

from randlora_pl.data import ImageData
from randlora_pl.data.unlabelled import batches, random_samples
from randlora_pl.lab.analysis.landscape import check_classes, stratified_fraction
from randlora_pl.utils.errors import UserError


def digits(seed: int = 0) -> ImageData:
    data = ImageData(dataset="digits", image_size=32, seed=seed)
    data.setup()
    return data


def test_a_share_is_the_same_for_all_and_has_every_class() -> None:
    one, other = (stratified_fraction(digits(seed).samples("train"), 0.05, 7) for seed in (0, 1))
    assert list(one.keys) == list(other.keys) and len(one) == round(0.05 * 1294)
    counts = np.bincount(one.labels)
    assert len(counts) == 10 and counts.min() >= 6 and counts.max() <= 7
    assert list(stratified_fraction(digits().samples("train"), 0.05, 8).keys) != list(one.keys)
    assert len(stratified_fraction(one, 1e-9, 0)) == 1 and len(stratified_fraction(one, 1, 0)) == len(one)


def test_some_are_the_first_of_a_random_order() -> None:
    samples = digits().samples("test")
    few, more, every = (random_samples(samples, count, 0) for count in (10, 20, None))
    assert list(more.keys)[:10] == list(few.keys) and sorted(every.keys) == sorted(samples.keys)
    assert len(np.unique(few.labels)) > 3  # not one class after the other


def test_batches_are_of_nearly_equal_size_and_hold_each_image_once() -> None:
    data = digits()
    samples = random_samples(data.samples("test"), 45, 0)
    made = list(batches(data, samples, 20))
    assert [len(images) for images, _ in made] == [15, 15, 15]
    assert torch.equal(torch.cat([labels for _, labels in made]), torch.from_numpy(samples.labels))
    assert made[0][0].shape == (15, 3, 32, 32) and made[0][0].dtype == torch.float32
    test = next(iter(data.test_dataloader()))["image"]
    places = {name: place for place, name in enumerate(data.samples("test").keys)}
    torch.testing.assert_close(made[0][0][0], test[places[samples.keys[0]]])


def test_refusals() -> None:
    data = digits()
    with pytest.raises(UserError, match="no images"):
        next(batches(data, random_samples(data.samples("test"), 0, 0), 4))
    check_classes(data, list(data.classnames))
    with pytest.raises(UserError, match="--dataset"):
        check_classes(data, ["cat", "dog"])
