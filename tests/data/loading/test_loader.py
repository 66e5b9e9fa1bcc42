import gc
import logging
import multiprocessing
import pickle
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from randlora_pl.data.catalog import find
from randlora_pl.data.image_batches import CachedImages, EvalBatches, Late, TrainBatches
from randlora_pl.data.loader import Batch, DrawPlan, EvalSchedule, Loader, TrainSchedule
from randlora_pl.data.readers import Samples, in_key_order
from randlora_pl.data.readers.trees import folder
from randlora_pl.data.sources import ArrayImages
from randlora_pl.data.transforms import finish
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec
from tests.data.conftest import Tree
from tests.data.images.batches import train_batch
from tests.support.products import covering

FRAME = ImageSpec(12)


def samples_of(count: int = 23) -> Samples:
    array = np.random.default_rng(0).integers(0, 256, (count, 9, 9, 1), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int64) % 4
    return in_key_order(ArrayImages(array, "test"), labels, [f"{number:03d}" for number in range(count)], "abcd")


def train(samples: Samples, sampling: str = "with_replacement", batch: int = 4, accumulate: int = 2) -> TrainBatches:
    plan = DrawPlan(len(samples), 50, batch * accumulate, 5, sampling)
    return TrainBatches(samples, TrainSchedule(plan, batch, accumulate), FRAME, (0.5, 1.0), True)


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)
        for a, b in zip(first, second, strict=True)
    )


def test_training_batch_holds_what_it_says() -> None:
    samples = samples_of()
    batches = train(samples)
    assert len(batches) == 13
    for number in (0, 1, 12):
        batch = batches[number]
        positions = batch["position"]
        assert torch.equal(batch["index"], batches.schedule.plan.samples(positions))
        assert batch["label"].tolist() == samples.labels[batch["index"]].tolist()
        images = [torch.from_numpy(samples.images.load(row)) for row in samples.rows[batch["index"]].tolist()]
        assert torch.equal(batch["image"], train_batch(images, positions, 5, FRAME, (0.5, 1.0), True))
        step = batches.schedule.plan.samples(batches.schedule.plan.step_positions(number // 2))
        labels = samples.labels[step].tolist()
        assert batch["step_classes"].tolist() == sorted(set(labels))
        assert batch["step_counts"].tolist() == [labels.count(label) for label in sorted(set(labels))]
        own = batch["label"].tolist()
        assert batch["own_classes"].tolist() == sorted(set(own))
        assert batch["own_counts"].tolist() == [own.count(label) for label in sorted(set(own))]
    assert (batches[0]["micro_batch"], batches[1]["micro_batch"], batches[0]["micro_batches"]) == (0, 1, 2)
    assert (len(batches[12]["position"]), batches[12]["micro_batches"]) == (2, 1)  # 50 = 6 x 8 + 2
    kinds = {key: value.dtype for key, value in batches[0].items() if isinstance(value, torch.Tensor)}
    assert kinds == {
        **dict.fromkeys(("image", "weight"), torch.float32),
        **dict.fromkeys(("label", "position", "index"), torch.int64),
        **dict.fromkeys(("step_classes", "step_counts", "own_classes", "own_counts"), torch.int64),
    }


@pytest.mark.parametrize(("num_workers", "sampling"), covering([0, 2], ("with_replacement", "epochs"), strength=1))
def test_restart_is_bit_identical(num_workers: int, sampling: str) -> None:
    batches = train(samples_of(), sampling)
    undisturbed = list(Loader(batches))
    for start in (0, 6, 12, 13):
        loader = Loader(batches, start, num_workers)
        assert len(loader) == 13
        assert same(list(loader), undisturbed[start:])
        if num_workers:
            loader._iterator._shutdown_workers()
            loader._iterator = None


def test_loader_can_be_gone_through_again_with_workers() -> None:
    loader = Loader(EvalBatches(samples_of(), EvalSchedule(23, 5), FRAME), num_workers=1)
    assert same(list(loader), list(loader))


def test_workers_stop_at_once() -> None:
    """PyTorch alone waits 5 s for each worker of an iterator that is garbage of a cycle."""
    loader: Any = Loader(train(samples_of()), num_workers=1)
    loader.unfinished = iter(loader)
    next(loader.unfinished)
    (worker,) = loader._iterator._workers
    began = time.monotonic()
    del loader
    gc.collect()
    assert not worker.is_alive() and time.monotonic() - began < 4


def test_workers_stop_after_an_error(damaged: Samples) -> None:
    loader = Loader(train(damaged), num_workers=1)
    with pytest.raises(UserError):
        list(loader)
    assert loader._iterator is None and not multiprocessing.active_children()


def test_loader_counts_as_resumable() -> None:
    loader = Loader(train(samples_of()))
    loader.load_state_dict(loader.state_dict())
    assert loader.state_dict() == {}


@pytest.fixture
def damaged(tree: Tree) -> Samples:
    root = tree(cat=3, dog=3)
    path = root / "cat" / "001.png"
    path.write_bytes(path.read_bytes()[:200])
    samples = folder(find("folder"), root, "train")
    assert samples is not None
    return samples


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_image_stops_with_its_name(damaged: Samples, num_workers: int) -> None:
    for batches in (EvalBatches(damaged, EvalSchedule(6, 2), FRAME), train(damaged)):
        with pytest.raises(UserError) as caught:
            list(Loader(batches, num_workers=num_workers))
        assert "cat/001.png" in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_skipped_images_weigh_nothing_and_are_counted(
    damaged: Samples, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    skipped: dict[str, str] = {}
    evaluation = EvalBatches(damaged, EvalSchedule(6, 2), FRAME, skip=True)
    training = train(damaged)
    training = TrainBatches(damaged, training.schedule, FRAME, (0.5, 1.0), True, skip=True)
    with caplog.at_level(logging.WARNING, "randlora_pl"):
        found = list(Loader(evaluation, 0, num_workers, skipped))
        drawn = list(Loader(training, 0, num_workers, skipped))
    assert [batch["weight"].tolist() for batch in found] == [[1, 0], [1, 1], [1, 1]]
    for batch in drawn:
        assert "bad" not in batch and batch["image"].isfinite().all()
        for place, index in enumerate(batch["index"].tolist()):
            assert (batch["weight"][place] == 0) == (index == 1)
            assert (batch["image"][place].abs() < 0.01).all() == (index == 1)
    ((name, reason),) = skipped.items()
    assert Path(name).name == "001.png" and "truncated" in reason
    assert len(caplog.messages) == 1 and "skipped the unreadable image" in caplog.text


def test_a_machine_out_of_memory_skips_no_image(damaged: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", full)
    with pytest.raises(UserError, match="out of memory"):
        list(Loader(EvalBatches(damaged, EvalSchedule(6, 2), FRAME, skip=True)))


@pytest.mark.parametrize("late", ["colors", "crops"])
def test_what_is_left_to_the_device_comes_to_the_same(late: Late) -> None:
    samples = samples_of()
    evaluation = EvalBatches(samples, EvalSchedule(len(samples), 10), FRAME)
    training = train(samples)
    for whole in (training, evaluation):
        batches = replace(whole, late=late)
        for number in range(len(batches)):
            sent = batches[number]
            assert sent["image"].dtype == torch.uint8
            assert sent["image"].shape[-1] == (9 if late == "crops" and whole is training else 12)
            assert same([finish(sent, FRAME)], [whole[number]])


def test_finished_batches_are_left_alone() -> None:
    batch = train(samples_of())[0]
    assert finish(batch, FRAME) is batch


def test_batches_travel_to_spawned_workers(tree: Tree) -> None:
    """macOS and Windows start workers from a pickle, not from a copy of the process."""
    samples = folder(find("folder"), tree(cat=3, dog=3), "train")
    assert samples is not None
    batches = train(replace(samples, images=CachedImages(samples.images, samples.rows)))
    assert same([pickle.loads(pickle.dumps(batches))[0]], [batches[0]])
