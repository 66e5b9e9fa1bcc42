"""Preprocessing of images for a model, with the user's options."""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from randlora_pl.utils.errors import UserError, brief, near
from randlora_pl.utils.image_spec import LEAST_CROP, MOST_CROP, RESIZES, ImageSpec

MODEL = "model"
"""Value of ``--data.resize`` for the model's own preprocessing."""


@dataclass(frozen=True)
class Frame(ImageSpec):
    """Image preprocessing of a run."""

    @classmethod
    def of(cls, spec: ImageSpec | None, options: Mapping[str, Any] = MappingProxyType({})) -> "Frame":
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
                "leave it out (LinearHeadTask takes another size by --model.img_size)"
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
        f"--data.resize {brief(text)}: the number behind the colon must lie between {LEAST_CROP} and {MOST_CROP}"
    )


def resize_option(resize: str, crop_pct: float) -> str:
    """Return the value of ``--data.resize``, see `read_resize`."""
    return resize if crop_pct == 1 else f"{resize}:{crop_pct!r}"
