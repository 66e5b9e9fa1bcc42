"""Yes or no for each of many samples, as text of a sixth of a character each."""

import base64

import numpy as np
from numpy.typing import NDArray

MOST = 100_000
"""Largest number of samples: 17 kB of text."""


def packed(values: list[bool]) -> str:
    """Return the number of values, a colon, and the values as bits in base64."""
    return f"{len(values)}:{base64.b64encode(np.packbits(values).tobytes()).decode()}"


def unpacked(text: object) -> NDArray[np.bool_] | None:
    """Return the values of a text that `packed` made; None for anything else."""
    count, _, bits = text.partition(":") if isinstance(text, str) else ("", "", "")
    if not (count.isascii() and count.isdigit() and len(count) <= len(str(MOST)) and len(bits) <= MOST // 4):
        return None
    try:
        data = np.frombuffer(base64.b64decode(bits, validate=True), np.uint8)
    except ValueError:
        return None
    return np.unpackbits(data, count=int(count)).astype(bool) if len(data) == -(-int(count) // 8) else None
