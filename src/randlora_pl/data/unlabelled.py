"""Images apart from training: files for prediction, a random choice for analyses, and contact sheets to look at."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from randlora_pl.data.catalog import SPLITS, DatasetSpec
from randlora_pl.data.image_batches import EvalBatches, default_workers
from randlora_pl.data.loader import EvalSchedule, Loader
from randlora_pl.data.module import ImageData
from randlora_pl.data.readers import Samples
from randlora_pl.data.readers.trees import image_names
from randlora_pl.data.sources import FORMATS, MOST_PIXELS, ArrayImages, FileImages, Pixels, decode
from randlora_pl.data.splits import evenly, few_of
from randlora_pl.data.transforms import eval_batch, pixels_needed
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError, shorten
from randlora_pl.utils.files import atomic_file, disk_errors
from randlora_pl.utils.image_spec import ImageSpec
from randlora_pl.utils.text import for_figure

MOST_CLASSES = 20
GAP = 3
THUMB = 88
"""Height and width of an image with its white edge, in pixels."""


def frame_of(metadata: Mapping[str, Any], spec: ImageSpec) -> ImageSpec:
    """Return the preprocessing of the training images in the metadata of `read_adapter`, or the model's own.

    Raises:
        UserError: The stored size does not fit the model.
    """
    trained = metadata.get("training", {}).get("frame")
    if trained is None:
        return spec
    if trained["size"] != spec.size:
        raise UserError(
            f"The adapter's metadata.training.frame has size {trained['size']}, which does not fit the model's images "
            f"of {spec.size} pixels. Copy the adapter again."
        )
    return ImageSpec.of_values(trained)


def read_image(
    content: bytes, name: str, frame: ImageSpec, formats: Sequence[str] = FORMATS, most_pixels: int = MOST_PIXELS
) -> Tensor:
    """Preprocess one image for evaluation, float32 (1, 3, size, size), exactly like `open_images` for such a file.

    Raises:
        UserError: The bytes are not a readable image.
    """
    short, color = pixels_needed(frame, None), frame.behind
    pixels = decode(name, short, content, formats=formats, most_pixels=most_pixels, background=color)
    return eval_batch([torch.from_numpy(pixels)], frame)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the given files, and all image files below the given folders, in order.

    Raises:
        UserError: A path does not exist, or a folder has no images.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            here = [path / name for name in image_names(path)[0]]
            if not here:
                raise UserError(f"The folder {path} has no images (.jpg, .png ...)")
            files += here
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path} does not exist. Give image files, or folders with images")
    if not files:
        raise UserError("No images were given")
    return files


def open_images(
    paths: Sequence[Path],
    spec: ImageSpec,
    batch_size: int = 256,
    num_workers: int = 0,
    skip: bool = False,
    most_pixels: int = MOST_PIXELS,
) -> tuple[Loader, list[Path]]:
    """Open images as evaluation batches.

    Examples:
        >>> loader, files = open_images([Path("photos")], load_clip("tiny").image)
        >>> next(iter(loader))["image"].shape
        torch.Size([3, 3, 32, 32])

    Args:
        paths: Files, and folders to search.
        spec: Image format of the model.
        batch_size: Batch size.
        num_workers: Worker processes; 0 decodes in this process.
        skip: Skip unreadable images; the loader's ``skipped`` lists them.
        most_pixels: Maximum width x height of an image.

    Returns:
        Loader of batches as `EvalBatches` gives them, with ``weight`` 0 for skipped images; and the files by ``index``.

    Raises:
        UserError: A path does not exist or a folder has no images; while iterating: an image is unreadable.
    """
    files = find_images([Path(path) for path in paths])
    numbers = np.arange(len(files), dtype=np.int64)
    images = FileImages(files, most_pixels=most_pixels, background=spec.behind)
    samples = Samples(images, numbers, np.zeros_like(numbers), [str(file) for file in files], ())
    batches = EvalBatches(samples, EvalSchedule(len(files), batch_size), spec, skip)
    return Loader(batches, num_workers=num_workers), files


def framed(options: dict[str, Any], frame: ImageSpec, batch: int) -> ImageData:
    """Return data with the preprocessing of a frame, for one pass over its images."""
    data = ImageData(**options, eval_batch_size=batch, cache_images=False)
    data.spec = frame
    return data


def random_samples(samples: Samples, count: int | None, seed: int) -> Samples:
    """Return this many samples, or all, in random order."""
    order = rng.permutation(seed, "analysis/order", len(samples)).numpy()
    return samples.subset(order if count is None else np.asarray(order[:count]))


def batches(
    data: ImageData, samples: Samples, size: int, device: torch.device | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images (b, 3, H, W) with test preprocessing and labels (b,), in batches of nearly equal size.

    Raises:
        UserError: The samples are empty, or an image cannot be read.
    """
    if not len(samples):
        raise UserError(f"{data.row.title} has no images of this kind.")
    size = -(-len(samples) // -(-len(samples) // size))
    numbered = EvalBatches(samples, EvalSchedule(len(samples), size), data.frame, data.skip)
    workers = default_workers(isinstance(samples.images, ArrayImages), data.frame, 1)
    for batch in Loader(numbered, 0, workers, data.skipped):
        good = batch["weight"] > 0
        yield batch["image"][good].to(device), batch["label"][good].to(device)


@dataclass(frozen=True)
class Sheet:
    """Contents of a contact sheet: names and images of the classes shown, and prompts of the first one."""

    title: str
    caption: str
    names: list[str]
    images: list[list[Pixels]]
    prompts: list[str]

    @classmethod
    def read(cls, row: DatasetSpec, root: Path, shots: int) -> "Sheet":
        """Read a dataset and choose the images of few-shot training with seed 0, or test images if it has no others.

        Args:
            row: Specification of the dataset.
            root: Folder (or file) of the dataset.
            shots: Images per class.

        Raises:
            UserError: The dataset is damaged.
        """
        data = ImageData(dataset=row.name, root=str(root), cache_images=False)
        shown = "test" if row.trains_on else "train"
        data.setup(shown if row.trains_on else None)
        samples = data.samples(shown)
        chosen = few_of(samples, shots, data.seed)
        owners, members = chosen.pairs
        there = np.unique(samples.pairs[1])
        labels = there[evenly(len(there), MOST_CLASSES)].tolist()
        images = []
        for label in labels:
            rows = chosen.rows[owners[members == label][:shots]].tolist()
            try:
                images.append([samples.images.load(number) for number in rows])
            except UserError as error:
                below = f" --root {root}" if row.layout else ""
                check = f"randlora-pl data check {row.name}{below} --every-image"
                raise UserError(error.what, f"Run: {check}", error.where) from error
        splits = (shown,) if row.trains_on else SPLITS
        counts = ", ".join(f"{split} {len(data.samples(split)):,}" for split in splits)
        what = "captions" if row.captions else "classes"
        some = f"{len(labels)} of {len(there)} {what}, evenly chosen" if len(labels) < len(there) else f"all {what}"
        caption = f"Images: {counts}. Shown: {some}; up to {shots} {shown.replace('train', 'training')} images of each"
        prompts = [template.replace("{}", data.classnames[labels[0]]) for template in data.templates]
        return cls(row.title, caption, [data.classnames[label] for label in labels], images, prompts)

    def write(self, path: Path) -> None:
        """Draw a heading, then images below each class name, in as many columns as fit; write it as PNG atomically.

        Raises:
            UserError: The file cannot be written.
        """
        from matplotlib.figure import Figure

        strip = max(max(map(len, self.images)) * THUMB, 2 * THUMB)
        columns = max(1, min(len(self.names), 1_200 // strip))
        lines = -(-len(self.names) // columns)
        width = max(columns * (strip + 16), 480)
        more = f" (and {len(self.prompts) - 1} more)" if len(self.prompts) > 1 else ""
        heading = [line for text in (self.title, self.caption, f"Prompt of the dataset: {self.prompts[0]}{more}")
                   for line in textwrap.wrap(text, width // 7)]  # fmt: skip
        figure = Figure((width / 100, (lines * (THUMB + 30) + 20 * len(heading)) / 100), dpi=100, layout="constrained")
        figure.suptitle(for_figure("\n".join(heading)), x=0.01, ha="left", fontsize=9)
        panels = figure.subplots(lines, columns, squeeze=False).T.ravel()
        for axes in panels:
            axes.set_axis_off()
        for axes, name, images in zip(panels, self.names, self.images, strict=False):
            row = np.full((THUMB, strip, 3), 255, dtype=np.uint8)
            for place, image in enumerate(images):  # whole on a gray square; small ones keep their pixels visible
                drawn = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert("RGB")
                method = Image.Resampling.NEAREST if max(drawn.size) < THUMB else Image.Resampling.LANCZOS
                square = ImageOps.pad(drawn, (THUMB - 2 * GAP, THUMB - 2 * GAP), method, "#dddddd")
                row[:, place * THUMB : (place + 1) * THUMB] = np.asarray(ImageOps.expand(square, GAP, "white"))
            axes.imshow(row, interpolation="none")
            axes.set_title(for_figure(shorten(" ".join(name.split()), strip // 7)), loc="left", fontsize=9)
        with disk_errors(path), atomic_file(path) as stream:
            figure.savefig(stream, format="png")
