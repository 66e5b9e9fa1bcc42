"""Published few-shot draws: files of JSON lines, each with the path, the label and the class name of an image.

The paths start in a folder of the authors, so that an image is found by the end of its path.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from randlora_pl.data.readers.dispatch import Samples
from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.files.documents import parse_json
from randlora_pl.utils.files.plain_files import read_plain

LARGEST = 1 << 26
"""Maximum size of a draw in bytes: 16 images of 1,000 classes take about 3 million."""

_EXPECTED = 'expected {"path": "CLASS/IMAGE.jpg", "label": 0, "name": "CLASS"}'

log = logging.getLogger("randlora_pl")


def read_draw(path: Path, samples: Samples) -> Samples:
    """Return the samples that a draw lists, in key order; an image that is listed twice counts twice.

    Args:
        path: Draw. Its keys are ``path``, ``label`` and ``name``, or ``_impath``, ``_label`` and ``_classname``.
        samples: Training samples of all classes.

    Raises:
        UserError: The file is missing or damaged, or a line does not fit the samples.
    """
    try:
        lines = read_plain(path, LARGEST).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(f"The shots file {path} {why}") from error
    listed = {number: _line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()}
    if not listed:
        raise UserError(f"The shots file {path} is empty")
    ends = {parts[-1] for parts, _ in listed.values()}
    places: dict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(samples.keys):
        end = key.rpartition("/")[2]
        if end in ends:
            places[end].append(index)
    chosen = [_found(f"{path}, line {number}", *line, samples, places) for number, line in listed.items()]
    return samples.subset(np.sort(np.asarray(chosen, dtype=np.int64)))


def shots_of(path: Path, drawn: Samples, shots: int | None) -> int:
    """Return the images that a draw has of its largest class; warn about classes that it lacks.

    Raises:
        UserError: ``shots`` is another number.
    """
    counts = np.bincount(drawn.labels, minlength=len(drawn.classes))
    most = int(counts.max(initial=0))
    if shots not in (None, most):
        raise UserError(
            f"The shots file {path} has {most} images of a class, not --data.shots {shots}. Remove the option"
        )
    lacking = np.flatnonzero(counts == 0)
    if len(lacking):
        names = (len(lacking), len(counts), drawn.classes[lacking[0]])
        log.warning("the shots file %s has no images of %d of %d classes, the first: %r", path, *names)
    return most


def _line(path: Path, number: int, line: str) -> tuple[list[str], int]:
    """Return the parts of the path and the label of a line."""
    try:
        content = parse_json(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: {brief(line)} is not JSON ({error}); {_EXPECTED}") from error
    known: dict[str, Any] = {}
    if isinstance(content, dict):
        known = {name.lstrip("_"): value for name, value in content.items()}
    image, label = known.get("impath", known.get("path")), known.get("label")
    parts = [part for part in image.replace("\\", "/").split("/") if part] if isinstance(image, str) else []
    if not parts or not isinstance(label, int) or isinstance(label, bool):
        raise UserError(f"{path}, line {number}: {brief(line)} has no path and label; {_EXPECTED}")
    return parts, label


def _found(where: str, parts: Sequence[str], label: int, samples: Samples, places: dict[str, list[int]]) -> int:
    """Return the index of the sample whose key has the longest end in common with a path.

    Raises:
        UserError: No sample fits, several fit equally well, or its label is another one.
    """
    image = "/".join(parts[-3:])
    common = {index: _common(samples.keys[index].split("/"), parts) for index in places.get(parts[-1], ())}
    longest = [index for index, length in common.items() if length == max(common.values())]
    if not longest:
        raise UserError(
            f"{where}: {image!r} is not among the {len(samples):,} training images. "
            "The draw is of another dataset or split (--data.split coop?)"
        )
    if len(longest) > 1:
        some = " and ".join(repr(samples.keys[index]) for index in longest[:2])
        raise UserError(f"{where}: {image!r} fits {len(longest)} training images, such as {some}")
    own = int(samples.labels[longest[0]])
    if own != label:
        raise UserError(
            f"{where}: {image!r} has label {label}, but here {own} ({samples.classes[own]!r}). "
            "The draw is of another split (--data.split coop?)"
        )
    return longest[0]


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the number of equal parts at the ends of two paths."""
    length = 0
    for one, other in zip(reversed(first), reversed(second), strict=False):
        if one != other:
            break
        length += 1
    return length
