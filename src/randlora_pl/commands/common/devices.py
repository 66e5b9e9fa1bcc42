"""The device of commands that use a trained model, and advice if it fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from randlora_pl.utils.errors import TooLargeImageError, UnreadableImageError, UserError


def pick_device(name: str) -> Any:
    """Return a device of this machine; ``auto`` selects the fastest one, others are refused if they do not exist."""
    import torch

    there = ["cuda"] if torch.cuda.is_available() else []
    there += ["mps"] if torch.backends.mps.is_available() else []
    there += ["cpu"]
    if name == "auto":
        return torch.device(there[0])
    if name.partition(":")[0] not in there:
        raise UserError(f"--device {name} is not on this machine; there is {', '.join(there)}.")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device: give cpu, cuda, cuda:1 and so on.") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise UserError(f"--device {name} is not on this machine; the last one is {device.type}:{count - 1}.")
    return device


@contextmanager
def advised(smaller: str, unreadable: str = "", too_large: str = "") -> Iterator[None]:
    """Raise errors of one line, with advice, for what can go wrong while a model works.

    Args:
        smaller: Option to try if memory runs out.
        unreadable: What to do about an image that cannot be read.
        too_large: What to do about an image that is too large, if something else.
    """
    from randlora_pl.run.error_messages import out_of_memory

    try:
        yield
    except UnreadableImageError as error:
        hint = too_large if too_large and isinstance(error, TooLargeImageError) else unreadable
        raise UserError(error.what, hint, error.where) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"out of memory; try {smaller}") from error
