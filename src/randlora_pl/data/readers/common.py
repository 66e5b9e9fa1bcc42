"""Helpers of readers of image files: errors, and samples from (path, label) entries."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.images.sources import FileImages, PathsBelow, absent
from randlora_pl.data.readers.dispatch import Samples, in_key_order, missing
from randlora_pl.utils.errors import UserError, errors_in
from randlora_pl.utils.files.plain_files import read_plain


def lines(row: DatasetSpec, root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text) of the non-blank lines of an annotation file."""
    try:
        text = read_plain(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise missing(row, root, f"{path.relative_to(root)} {what}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def wrong_line(path: Path, number: int, line: str, expected: str) -> UserError:
    """Return the error for an invalid line of an annotation file."""
    return UserError(f"{path}, line {number}: {line!r} is not of the form {expected}")


def file_samples(
    row: DatasetSpec, root: Path, home: Path, entries: Sequence[tuple[str, int]], classes: Sequence[str], listed: str
) -> Samples:
    """Return samples of the image files ``entries``: (path below ``home`` with forward slashes, label) of each.

    The path is the key of an image. ``listed`` is the source of the entries, for messages.
    """
    paths = [path for path, _ in entries]
    lacking = absent(home, paths)
    if lacking:
        what = f"{len(lacking)} of {len(entries)} images of {listed} do not exist"
        raise missing(row, root, f"{what}, the first: {home / paths[lacking[0]]}")
    with errors_in(f"{row.title}: {listed}"):
        return in_key_order(FileImages(PathsBelow(home, paths)), [label for _, label in entries], paths, classes)
