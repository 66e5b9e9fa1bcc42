"""Preprocessing of images for a model, with the user's options."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec

INTERPOLATIONS = ("bicubic", "bilinear")
RESIZES = ("crop", "pad")


@dataclass(frozen=True)
class Frame(ImageSpec):
    """Image preprocessing of a run."""

    @classmethod
    def of(cls, spec: ImageSpec | None, options: Mapping[str, Any] = MappingProxyType({})) -> "Frame":
        """Return the preprocessing of a model, with options that are not None in place of its own values.

        Raises:
            UserError: The size is not the model's.
        """
        if spec is not None and options.get("size") not in (None, spec.size):
            raise UserError(
                f"--data.image_size is {options['size']}, but the model takes images of {spec.size} pixels: "
                "leave it out (LinearHeadTask takes another size by --model.img_size)"
            )
        own = {} if spec is None else asdict(spec)
        return cls(**own | {name: value for name, value in options.items() if value is not None})
