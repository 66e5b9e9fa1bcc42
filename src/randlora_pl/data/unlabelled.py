"""Images without labels, for prediction: files and folders named on the command line."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from randlora_pl.data.images.decode import FORMATS, MOST_PIXELS, FileImages, decode
from randlora_pl.data.images.frame import Frame, ImageSpecLike
from randlora_pl.data.images.transforms import eval_batch, pixels_needed
from randlora_pl.data.loading.image_batches import load_images
from randlora_pl.data.loading.loader import Batch, Loader
from randlora_pl.data.readers.dispatch import Samples
from randlora_pl.data.readers.own.folder import list_images
from randlora_pl.data.sampling.schedule import EvalSchedule
from randlora_pl.utils.errors import UserError


@dataclass(frozen=True)
class PlainBatches:
    """Batches of ``image`` (b, 3, H, W) float32, ``index`` (b,) int64 and ``readable`` (b,) bool, in order."""

    samples: Samples
    schedule: EvalSchedule
    frame: Frame
    skip: bool = False

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, number: int) -> Batch:
        places, _ = self.schedule[number]
        images, bad = load_images(self.samples, places, self.frame, None, self.skip)
        readable = torch.tensor([place not in bad for place in range(len(images))])
        batch = {"image": eval_batch(images, self.frame), "index": places, "readable": readable}
        return batch | ({"bad": list(bad.values())} if bad else {})


def frame_of(metadata: Mapping[str, Any], spec: ImageSpecLike) -> Frame:
    """The frame of the images that an adapter was trained on, or its model's where it does not say.

    Args:
        metadata: The adapter's.
        spec: What the model expects of an image.

    Raises:
        UserError: The images had another size than the model takes, or no spread.
    """
    trained = metadata.get("training", {}).get("frame")
    if trained is None:
        return Frame.of(spec)
    if trained["size"] != spec.size or not all(0 < value < math.inf for value in trained["std"]):
        raise UserError(
            f"The adapter's metadata.training.frame has size {trained['size']} and std {trained['std']}, which does "
            f"not fit the model's images of {spec.size} pixels. Copy the adapter again."
        )
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in trained.items()}
    return Frame.of(SimpleNamespace(**{"resize": "crop"} | values))


def read_image(
    content: bytes, name: str, frame: Frame, formats: Sequence[str] = FORMATS, most_pixels: int = MOST_PIXELS
) -> Tensor:
    """One image in evaluation form, the same numbers as `open_images` gives for a file of these bytes.

    Args:
        content: The file's bytes.
        name: What to call it in a message.
        frame: How images are prepared.
        formats: Pillow's names of the formats that are taken.
        most_pixels: Width x height that it may have.

    Returns:
        float32 (1, 3, size, size).

    Raises:
        UserError: It cannot be read as an image.
    """
    pixels = decode(name, pixels_needed(frame, None), content, formats=formats, most_pixels=most_pixels)
    return eval_batch([torch.from_numpy(pixels)], frame)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files named, and all image files below the folders named, in order.

    Raises:
        UserError: A path does not exist, or a folder holds no images.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            here = list_images(path)
            if not here:
                raise UserError(f"The folder {path} holds no images (.jpg, .png ...)")
            found += here
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"The image {path} does not exist")
    if not found:
        raise UserError("No images were named")
    return found


def open_images(
    paths: Sequence[Path],
    spec: ImageSpecLike,
    batch_size: int = 256,
    num_workers: int = 0,
    skip: bool = False,
    most_pixels: int = MOST_PIXELS,
) -> tuple[Loader, list[Path]]:
    """Batches of images in evaluation form.

    Args:
        paths: Files, and folders to be searched.
        spec: What the model expects of an image.
        batch_size: Images of a batch.
        num_workers: Processes that decode; 0 decodes in this one.
        skip: Go on after an unreadable image; the loader's ``skipped`` names it.
        most_pixels: Width x height that an image may have.

    Returns:
        A loader of ``{"image": (b, 3, H, W) float32, "index": (b,) int64, "readable": (b,) bool}``,
        and the files that ``index`` counts.

    Raises:
        UserError: A path does not exist or a folder holds no images; while iterating: an image cannot be read.
    """
    files = find_images([Path(path) for path in paths])
    numbers = np.arange(len(files), dtype=np.int64)
    samples = Samples(
        FileImages(files, most_pixels), numbers, np.zeros_like(numbers), [str(file) for file in files], ()
    )
    batches = PlainBatches(samples, EvalSchedule(len(files), batch_size), Frame.of(spec), skip)
    return Loader(batches, num_workers=num_workers), files
