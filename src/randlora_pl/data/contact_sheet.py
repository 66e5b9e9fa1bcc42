"""Contact sheet of a dataset: training images of some classes, with names, split counts and prompts."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.check import evenly
from randlora_pl.data.module import ImageData
from randlora_pl.data.sampling.splits import few_shot
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import atomic_file, disk_errors
from randlora_pl.utils.text.printable import printable

MOST_CLASSES = 20
THUMB = 88
GAP = 6
LINE = 20
MARGIN = 16
WIDTH = 1_200
"""Maximum width in pixels of a sheet with several columns."""


@dataclass(frozen=True)
class Sheet:
    """Contents of a contact sheet.

    Attributes:
        title: Full name of the dataset.
        caption: Split counts, and a description of the selection.
        names: Names of the classes shown.
        images: Images of each class.
        prompts: Prompts of the first class shown.
    """

    title: str
    caption: str
    names: list[str]
    images: list[list[NDArray[np.uint8]]]
    prompts: list[str]

    @classmethod
    def of(cls, row: DatasetSpec, root: Path, shots: int) -> "Sheet":
        """Read a dataset and choose the images of few-shot training with seed 0.

        Args:
            row: Specification of the dataset.
            root: Folder (or file) of the dataset.
            shots: Images per class.

        Raises:
            UserError: The dataset is damaged.
        """
        data = ImageData(dataset=row.name, root=str(root), cache_images=False)
        data.setup()
        samples = data.samples("train")
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
        counts = ", ".join(f"{split} {len(data.samples(split)):,}" for split in ("train", "val", "test"))
        what = "captions" if row.captions else "classes"
        some = f"{len(labels)} of {len(there)} {what}, evenly chosen" if len(labels) < len(there) else f"all {what}"
        caption = f"Images: {counts}. Shown: {some}; up to {shots} training images of each"
        prompts = [template.replace("{}", data.classnames[labels[0]]) for template in data.templates]
        return cls(row.title, caption, [data.classnames[label] for label in labels], images, prompts)

    def write(self, path: Path) -> None:
        """Draw the sheet and write it as PNG atomically.

        Raises:
            UserError: The file cannot be written.
        """
        sheet = self.draw()
        with disk_errors(path), atomic_file(path) as stream:
            sheet.save(stream, "PNG")

    def draw(self) -> Image.Image:
        """Draw a heading, then images below each class name, in as many columns as fit."""
        across = max(map(len, self.images))
        column = max(across * (THUMB + GAP), 180) + MARGIN
        columns = max(1, min(len(self.names), (WIDTH - MARGIN) // column))
        lines = -(-len(self.names) // columns)
        width = max(columns * column + MARGIN, 480)
        more = f" (and {len(self.prompts) - 1} more)" if len(self.prompts) > 1 else ""
        heading = [
            *textwrap.wrap(self.caption, width // 8),
            *textwrap.wrap(f"Prompt: {self.prompts[0]}{more}", width // 8),
        ]
        top = 2 * MARGIN + LINE * (len(heading) + 1)
        block = LINE + THUMB + 2 * GAP
        sheet = Image.new("RGB", (width, top + lines * block + MARGIN), "white")
        pen = ImageDraw.Draw(sheet)
        bold, plain = _font("DejaVuSans-Bold.ttf", 16), _font("DejaVuSans.ttf", 13)
        pen.text((MARGIN, MARGIN), _fitting(self.title, bold, width - 2 * MARGIN), "black", bold)
        for number, line in enumerate(heading, 1):
            pen.text((MARGIN, MARGIN + 4 + LINE * number), printable(line), "#444444", plain)
        for index, (name, images) in enumerate(zip(self.names, self.images, strict=True)):
            left, upper = MARGIN + index // lines * column, top + index % lines * block
            pen.text((left, upper), _fitting(name, plain, column - MARGIN), "black", plain)
            for number, image in enumerate(images):
                sheet.paste(_thumb(image), (left + number * (THUMB + GAP), upper + LINE))
        return sheet


def _thumb(image: NDArray[np.uint8]) -> Image.Image:
    """Return the whole image on a gray square; small images keep their pixels visible."""
    drawn = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert("RGB")
    scale = THUMB / max(drawn.size)
    size = (max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale)))
    drawn = drawn.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    square = Image.new("RGB", (THUMB, THUMB), "#dddddd")
    square.paste(drawn, ((THUMB - size[0]) // 2, (THUMB - size[1]) // 2))
    return square


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Load a font shipped with matplotlib, which covers more than Latin letters."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _fitting(text: str, font: ImageFont.FreeTypeFont, room: int) -> str:
    """Return the text on one line, truncated to the available width."""
    line = printable(" ".join(text.split()))
    if font.getlength(line) <= room:
        return line
    while line and font.getlength(line + "...") > room:
        line = line[:-1]
    return line + "..."
