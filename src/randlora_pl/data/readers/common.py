"""Helpers of readers of image files: errors, and samples from (path, label) entries."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.images.decode import FileImages, PathsBelow, absent
from randlora_pl.data.readers.dispatch import Samples, in_key_order, missing
from randlora_pl.utils.errors import UserError, errors_in
from randlora_pl.utils.files.plain_files import read_plain


def lines(row: DatasetSpec, root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text) of the non-blank lines of an annotation file.

    Raises:
        UserError: The file is missing or not text.
    """
    try:
        text = read_plain(path).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise missing(row, root, f"{path.relative_to(root)} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise missing(row, root, f"{path.relative_to(root)} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def wrong_line(path: Path, number: int, line: str, expected: str) -> UserError:
    """Return the error for an invalid line of an annotation file."""
    return UserError(f"{path}, line {number}: {line!r} is not of the form {expected}")


def file_samples(
    row: DatasetSpec, root: Path, home: Path, entries: Sequence[tuple[str, int]], classes: Sequence[str], listed: str
) -> Samples:
    """Return samples of image files.

    Args:
        row: Specification of the dataset.
        root: Folder of the datasets.
        home: Folder of the relative paths.
        entries: (path with forward slashes, label) per image; the path is its key.
        classes: Class names by label.
        listed: Source of the entries, for messages.

    Raises:
        UserError: An entry is repeated, or its file does not exist.
    """
    paths = [path for path, _ in entries]
    lacking = absent(home, paths)
    if lacking:
        first = home / paths[lacking[0]]
        raise missing(
            row, root, f"{len(lacking)} of {len(entries)} images of {listed} do not exist, the first: {first}"
        )
    with errors_in(f"{row.title}: {listed}"):
        return in_key_order(FileImages(PathsBelow(home, paths)), [label for _, label in entries], paths, classes)
