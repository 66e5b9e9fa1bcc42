"""Preprocessing of images for a model. Imports nothing heavy."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from randlora_pl.utils.errors import UserError, brief, near

INTERPOLATIONS = ("bicubic", "bilinear")
BACKGROUNDS = ("white", "black", "mean")
RESIZES = ("shortest", "longest", "squash")
LEAST_CROP, MOST_CROP = 0.05, 20
_LARGEST = 8192


@dataclass(frozen=True)
class ImageSpec:
    """Image preprocessing; the default is CLIP's.

    Attributes:
        size: Height and width in pixels.
        mean: Mean of each channel (red, green, blue) of images in [0, 1].
        std: Standard deviation of each channel of images in [0, 1].
        interpolation: ``bicubic`` or ``bilinear``.
        resize: ``shortest`` resizes the shorter side to the resized length (see `length`), ``longest`` the longer side,
            and ``squash`` both sides. The center is cropped, and what is missing is filled.
        crop_pct: Size divided by the resized length, as in timm.
        fill: Color of pixels outside the image, of 255.
        background: Color behind transparent pixels: ``white``, ``black`` or ``mean``, the mean color.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"
    resize: str = "shortest"
    crop_pct: float = 1.0
    fill: tuple[int, int, int] = (0, 0, 0)
    background: str = "white"

    @classmethod
    def choose(cls, spec: Self | None, options: Mapping[str, Any]) -> Self:
        """Return the preprocessing of a model, with options that are not None in place of its own values.

        Args:
            spec: The model's own.
            options: Fields of the preprocessing; ``resize`` as in ``--data.resize``.

        Raises:
            UserError: The size is not the model's, or no image can be prepared so.
        """
        if spec is not None and options.get("size") not in (None, spec.size):
            raise UserError(
                f"--data.image_size is {options['size']}, but the model takes images of {spec.size} pixels: "
                "leave it out (for another size of LinearHeadTask, set --model.img_size)"
            )
        own = {} if spec is None else asdict(spec)
        typed = {name: value for name, value in options.items() if value is not None and name != "resize"}
        resize, crop_pct = read_resize(options.get("resize", MODEL))
        frame = cls(**own | typed)
        if resize == MODEL:
            return frame
        chosen = replace(frame, resize=resize, crop_pct=crop_pct).checked("--data.resize")
        if resize == frame.resize:
            return chosen
        return chosen.filled_with_mean() if resize == "longest" else replace(chosen, fill=(0, 0, 0))

    @classmethod
    def of_values(cls, values: Mapping[str, Any]) -> Self:
        """Return the preprocessing of an adapter file; keys of a later version are ignored."""
        known: dict[str, Any] = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        return cls(**known)

    @property
    def length(self) -> int:
        """Length of the resized side in pixels."""
        return math.floor(self.size / self.crop_pct)

    @property
    def behind(self) -> tuple[int, int, int]:
        """Color behind transparent pixels, of 255."""
        if self.background == "mean":
            return self.filled_with_mean().fill
        return (255, 255, 255) if self.background == "white" else (0, 0, 0)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of an image after resizing, before the crop; rounded as open_clip and timm do."""
        length = self.length
        if self.resize == "squash":
            return length, length
        if self.resize == "shortest":
            short = min(height, width)
            return length * height // short, length * width // short
        ratio = max(height / length, width / length)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def steps(self) -> str:
        """Return how an image gets its size, as instructions."""
        length, square = self.length, f"{self.size} x {self.size}"
        if self.resize == "squash":
            resize = f"resize to {length} x {length} pixels"
        else:
            resize = f"resize the {'longer' if self.resize == 'longest' else 'shorter'} side to {length} pixels"
        cut = f", crop {square} from the center" if self.resize == "shortest" or length > self.size else ""
        color = "black" if not any(self.fill) else f"the color {', '.join(map(str, self.fill))} (of 255)"
        padded = f", fill {square} with {color}" if self.resize == "longest" or length < self.size else ""
        color = f"the mean color {', '.join(map(str, self.behind))}" if self.background == "mean" else self.background
        return f"lay transparent pictures on {color}, {resize} ({self.interpolation}, antialiased){cut}{padded}"

    def summary(self) -> str:
        """Return a one-line description."""
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"{self.size} pixels: {self.steps()}; mean {mean}, std {std}"

    def filled_with_mean(self) -> Self:
        """Return the same preprocessing, with the mean color outside the image."""
        red, green, blue = (min(255, max(0, round(255 * value))) for value in self.mean)
        return replace(self, fill=(red, green, blue))

    def problem(self) -> str:
        """Return the first value that no image can be prepared with, as the end of a sentence, or an empty string."""
        for name, known in (("resize", RESIZES), ("interpolation", INTERPOLATIONS), ("background", BACKGROUNDS)):
            value = getattr(self, name)
            if value not in known:
                return f"the {name} {brief(value)}.{near(str(value), known)} Known: {', '.join(known)}"
        if not _is_number(self.size, 1, _LARGEST) or not isinstance(self.size, int):
            return f"the size {brief(self.size)}. It must be a whole number from 1 to {_LARGEST}"
        if not _is_number(self.crop_pct, LEAST_CROP, MOST_CROP):
            return f"the crop_pct {brief(self.crop_pct)}. It must be a number from {LEAST_CROP} to {MOST_CROP}"
        if self.length < 1:
            return f"the crop_pct {self.crop_pct}. For images of {self.size} pixels it must be at most {self.size}"
        for name, least, most in (("mean", "-1e6", "1e6"), ("std", "1e-6", "1e6"), ("fill", "0", "255")):
            values = getattr(self, name)
            three = isinstance(values, Sequence) and len(values) == 3
            if not (three and all(_is_number(value, float(least), float(most)) for value in values)):
                return f"the {name} {brief(values)}. It must be three numbers from {least} to {most}"
        return ""

    def checked(self, owner: str) -> Self:
        """Return the preprocessing itself.

        Args:
            owner: Model or file that it belongs to, for the message.

        Raises:
            UserError: A value is unknown or impossible.
        """
        if problem := self.problem():
            raise UserError(f"{owner}: its preprocessing of images has {problem}.")
        return self


def _is_number(value: object, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


MODEL = "model"
"""Value of ``--data.resize`` for the model's own preprocessing."""


def read_resize(text: str) -> tuple[str, float]:
    """Split ``--data.resize``: ``MODE`` or ``MODE:CROP_PCT``; ``model`` is the model's own.

    Raises:
        UserError: The mode is unknown, or the number is impossible.
    """
    text = str(text)  # YAML reads `longest:` as a mapping
    mode, colon, number = text.partition(":")
    if mode not in RESIZES and text != MODEL:
        known = (MODEL, *RESIZES)
        raise UserError(f"--data.resize {brief(text)} is unknown.{near(mode, known)} Known: {', '.join(known)}")
    with contextlib.suppress(ValueError):
        crop_pct = float(number) if colon else 1.0
        if LEAST_CROP <= crop_pct <= MOST_CROP:
            return mode, crop_pct
    raise UserError(
        f"--data.resize {brief(text)}: the number after the colon must lie between {LEAST_CROP} and {MOST_CROP}"
    )
