"""Images a second that each stage of the input pipeline gives, beside the plain torchvision pipeline."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.datasets.folder import default_loader

from randlora_pl.data.image_batches import CachedImages, EvalBatches, Late, TrainBatches, load_images
from randlora_pl.data.loader import EvalSchedule, Loader, TrainSchedule
from randlora_pl.data.module import ImageData
from randlora_pl.data.readers import Samples
from randlora_pl.data.sources import FileImages
from randlora_pl.data.transforms import RATIO, finish, train_pixels
from randlora_pl.lab.bench import batches_ahead
from randlora_pl.utils.image_spec import ImageSpec

PLAIN = "plain torchvision"


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        run: One round; gives images a second.
        what: Counted units.
        whole: Whether it gives whole batches, to be compared with the plain pipeline.
    """

    name: str
    run: Callable[[], float]
    what: str
    whole: bool = False


def cases(data: ImageData, workers: int) -> list[Case]:
    """Return the stages in this process on one thread, whole loaders with workers, and the plain pipeline.

    Args:
        data: After ``setup("fit")``, without cached images; its plan has the number of images of a round.
        workers: Worker processes of the loaders.
    """
    assert data.plan is not None, "setup('fit') comes first"
    samples = data.samples("train")
    schedule = TrainSchedule(data.plan, data.batch_size, 1)
    batches = TrainBatches(samples, schedule, data.frame, data.crop_scale, bool(data.flip))
    evaluation = EvalBatches(
        samples, EvalSchedule(min(len(samples), data.plan.samples_drawn), data.batch_size), data.frame
    )
    cached = replace(batches, samples=replace(samples, images=CachedImages(samples.images, samples.rows)))
    plain = Plain(samples, data)
    order = data.plan.samples(torch.arange(data.plan.samples_drawn)).tolist()  # the same images

    def loader(chosen: TrainBatches | EvalBatches, late: Late) -> Callable[[], float]:
        return lambda: _loaded(Loader(replace(chosen, late=late), num_workers=workers), workers, data.frame)

    def plain_loader() -> float:
        return _loaded(DataLoader(plain, data.batch_size, sampler=order, num_workers=workers), workers, data.frame)

    def indices(number: int) -> Tensor:
        return schedule.plan.samples(schedule[number].positions)

    def images(chosen: Tensor) -> list[Tensor]:
        return load_images(samples, chosen, data.frame, batches.scale, skip=False)[0]

    def pixels(number: int, decoded: list[Tensor]) -> dict[str, Any]:
        positions, seed = schedule[number].positions, schedule.plan.seed
        return train_pixels(decoded, positions, seed, data.frame, batches.scale, batches.flip, late=False)

    def files(number: int) -> list[Any]:
        images = cast(FileImages, samples.images)
        return [images.path(row) for row in samples.rows[indices(number).numpy()].tolist()]

    def stage(prepare: Callable[[int], Any], work: Callable[[Any], Any]) -> Callable[[], float]:
        return lambda: _timed(schedule, prepare, work)

    crop = stage(lambda number: (number, images(indices(number))), lambda ready: pixels(*ready))
    floats = stage(lambda number: pixels(number, images(indices(number))), lambda ready: finish(ready, data.frame))
    wide = f"{workers} workers"
    stages = [
        Case("decode", stage(indices, images), "one thread: read and decode"),
        Case("crop, resize", crop, "one thread: decoded images to bytes of one size"),
        Case("flip, normalize", floats, "one thread: bytes to floats"),
        Case("training", loader(batches, "colors"), f"{wide}, flip and normalize here", whole=True),
        Case("training, floats", loader(batches, "nothing"), f"{wide}: all of it", whole=True),
        Case("training, cached", loader(cached, "colors"), f"{wide}, decoded images shared", whole=True),
        Case("evaluation", loader(evaluation, "colors"), f"{wide}, normalize here", whole=True),
        Case(PLAIN, plain_loader, f"{wide}: ImageFolder, v1 transforms, training", whole=True),
    ]
    if type(samples.images) is FileImages:  # not crops of them
        read = stage(files, lambda paths: [file.read_bytes() for file in paths])
        return [Case("read", read, "one thread: bytes of the files"), *stages]
    return stages


class Plain(Dataset[tuple[Tensor, int]]):
    """Pipeline of a one-page script: `torchvision.datasets.ImageFolder` with its version 1 transforms.

    Args:
        samples: The images; files are opened by `ImageFolder`'s own loader.
        data: Module with size, crops, flips and normalisation.
    """

    def __init__(self, samples: Samples, data: ImageData) -> None:
        self.samples = samples
        frame = data.frame
        mode = v1.InterpolationMode(frame.interpolation)
        self.transform = v1.Compose([
            v1.RandomResizedCrop(frame.size, data.crop_scale, RATIO, interpolation=mode),
            *([v1.RandomHorizontalFlip()] if data.flip else []),
            v1.ToTensor(),
            v1.Normalize(frame.mean, frame.std),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = int(self.samples.rows[index])
        images = self.samples.images
        if type(images) is FileImages:  # not crops of them
            image = default_loader(str(images.path(row)))
        else:
            image = Image.fromarray(images.load(row).squeeze()).convert("RGB")
        return self.transform(image), int(self.samples.labels[index])


def _loaded(loader: Iterable[Any], workers: int, frame: ImageSpec) -> float:
    """Return the images per second of a loader once its workers are at work."""
    whole = iter(loader)
    for _ in range(batches_ahead(workers)):
        next(whole)
    start, count = time.perf_counter(), 0
    for batch in whole:
        image = batch[0] if isinstance(batch, list | tuple) else finish(batch, frame)["image"]
        count += len(image)
    return count / (time.perf_counter() - start)


def _timed(schedule: TrainSchedule, prepare: Callable[[int], Any], stage: Callable[[Any], Any]) -> float:
    """Return the images per second of a stage over the first batches, on one thread as in a worker.

    Its inputs are prepared outside the clock.
    """
    seconds, count, threads = 0.0, 0, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(min(len(schedule), 8)):
            ready = prepare(number)
            start = time.perf_counter()
            stage(ready)
            seconds += time.perf_counter() - start
            count += len(schedule[number].positions)
    finally:
        torch.set_num_threads(threads)
    return count / seconds
