"""Contact sheet of a dataset: training images of some classes, with names, split counts and prompts."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageOps

from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.check import evenly
from randlora_pl.data.module import ImageData
from randlora_pl.data.readers.dispatch import SPLITS
from randlora_pl.data.splits import few_shot
from randlora_pl.utils.errors import UserError, shortened
from randlora_pl.utils.files import atomic_file, disk_errors
from randlora_pl.utils.text import for_figure

MOST_CLASSES = 20
GAP = 3
THUMB = 88
"""Height and width of an image with its white edge, in pixels."""


@dataclass(frozen=True)
class Sheet:
    """Contents of a contact sheet: names and images of the classes shown, and prompts of the first one."""

    title: str
    caption: str
    names: list[str]
    images: list[list[NDArray[np.uint8]]]
    prompts: list[str]

    @classmethod
    def of(cls, row: DatasetSpec, root: Path, shots: int) -> "Sheet":
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
        chosen = few_shot(samples.labels, samples.numbers, shots, data.seed)
        there = np.unique(samples.labels)
        labels = there[evenly(len(there), MOST_CLASSES)].tolist()
        images = []
        for label in labels:
            rows = samples.rows[chosen[samples.labels[chosen] == label]].tolist()
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
        strip = max(max(map(len, self.images)) * THUMB, 2 * THUMB)
        columns = max(1, min(len(self.names), 1_200 // strip))
        lines = -(-len(self.names) // columns)
        width = max(columns * (strip + 16), 480)
        more = f" (and {len(self.prompts) - 1} more)" if len(self.prompts) > 1 else ""
        heading = [line for text in (self.title, self.caption, f"Prompt of the dataset: {self.prompts[0]}{more}")
                   for line in textwrap.wrap(text, width // 7)]  # fmt: skip
        figure = Figure((width / 100, (lines * (THUMB + 30) + 20 * len(heading)) / 100), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
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
            axes.set_title(for_figure(shortened(" ".join(name.split()), strip // 7)), loc="left", fontsize=9)
        with disk_errors(path), atomic_file(path) as stream:
            figure.savefig(stream, format="png")
