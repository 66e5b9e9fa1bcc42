"""What the readers of image files share: messages, and samples out of (path, label) entries."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from randlora_pl.data.catalog.spec import Row
from randlora_pl.data.images.decode import FileImages, PathsBelow, absent
from randlora_pl.data.readers.dispatch import Samples, in_key_order, missing
from randlora_pl.utils.errors import UserError, errors_in
from randlora_pl.utils.files.plain_files import read_plain


def lines(row: Row, root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of the lines of an annotation file that are not blank.

    Raises:
        UserError: The file is missing or no text.
    """
    try:
        text = read_plain(path).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise missing(row, root, f"there is no {path.relative_to(root)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise missing(row, root, f"{path.relative_to(root)} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def wrong_line(path: Path, number: int, line: str, expected: str) -> UserError:
    """The error for a line of an annotation file that makes no sense."""
    return UserError(f"{path}, line {number}: {line!r} is not of the form {expected}")


def file_samples(
    row: Row, root: Path, home: Path, entries: Sequence[tuple[str, int]], classes: Sequence[str], listed: str
) -> Samples:
    """Samples of image files.

    Args:
        row: The data set.
        root: Folder that holds the data sets.
        home: What the paths are relative to.
        entries: (path with forward slashes, label) of each image; the path is its key.
        classes: Names of the labels.
        listed: Where the entries come from, for messages.

    Raises:
        UserError: An entry is there twice, or its file is not there.
    """
    paths = [path for path, _ in entries]
    lacking = absent(home, paths)
    if lacking:
        first = home / paths[lacking[0]]
        raise missing(
            row, root, f"{len(lacking)} of {len(entries)} images of {listed} are not there, the first: {first}"
        )
    with errors_in(f"{row.title}: {listed}"):
        return in_key_order(FileImages(PathsBelow(home, paths)), [label for _, label in entries], paths, classes)
