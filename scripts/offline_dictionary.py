"""Word pairs of a dictionary that Debian packages, for a decoder to learn: the German of an English word.

    apt-get install dict-freedict-eng-deu
    python scripts/offline_dictionary.py --output dictionary --pairs 500 --seed 0

The package (19 MB) is FreeDict's English-German dictionary in the format of dictd, made from Ding. Its license is the
GPL, version 3 or later (1995-2022 Frank Richter, 2020-2022 Einhard Leichtfuß), and holds for the written files, too.

A pair is the headword of an entry and its first translation, where both are words without digits and marks. Of entries
with one headword, the first is used. The folders have files for `--data.dataset jsonl`:

- ``learned``: the same ``--pairs`` for training, validation and test. They measure what a model has learned by heart.
- ``unseen``: others, for a single pass: 3,200 for training, 500 for validation, 500 for the test. No word is in two
  of these, and they are the same for each ``--pairs``.

``--seed`` selects the pairs.
"""

import argparse
import gzip
import json
import random
import re
import zlib
from base64 import b64decode
from pathlib import Path

from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import open_plain, write_text

PACKAGE = "dict-freedict-eng-deu"
INSTALLED = Path("/usr/share/dictd/freedict-eng-deu.dict.dz")
UNSEEN = {"train": 3200, "val": 500, "test": 500}

LARGEST = 1 << 27
"""Maximum bytes of a file, packed and unpacked; the dictionary has 80 million."""
MOST_LINES = 1 << 20
"""Maximum lines of an index; the dictionary's has 464,234."""
LONGEST = 400
"""Bytes of an entry that are read: its first two lines come within them, or it is left out."""

NUMBER = rb"([A-Za-z0-9+/]{1,8})"
INDEX = re.compile(rb"[^\t\n]*\t%b\t%b(?:\t[^\n]*)?\n?" % (NUMBER, NUMBER))
"""A line of an index: word, start and size of the entry in base64, perhaps a further column."""
WORDS = r"[^\W\d_]+(?:[ '-][^\W\d_]+)*"
ENTRY = re.compile(rf"({WORDS}) /[^/\n]*/(?: <[^<>\n]*>)*\n(?: *\[[^][\n]*\])* *({WORDS})(?=[,\n]| [<[])")
"""The start of a usable entry: headword, its sound, grammar; and below, after fields, the first translation."""


def read_pairs(file: Path) -> dict[str, str]:
    """Return the translations by headword of a packed dictionary, whose index is beside it.

    Raises:
        UserError: A file is missing, too large or damaged, or a line of the index is wrong; the message has the line.
    """
    index = file.with_name(f"{file.name.removesuffix('.dict.dz')}.index")
    pairs: dict[str, str] = {}
    try:
        with open_plain(file, LARGEST) as packed, gzip.open(packed) as stream:
            data = stream.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise UserError(f"{file} has more than {LARGEST:,} bytes when unpacked, and is not read.")
        with open_plain(index, LARGEST) as lines:
            for number, line in enumerate(lines, 1):
                if number > MOST_LINES:
                    raise UserError(f"{index} has more than {MOST_LINES:,} lines, and is not read.")
                if pair := _pair(data, line, f"{index}, line {number}"):
                    pairs.setdefault(*pair)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing. Install the dictionary: apt-get install {PACKAGE}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{file} cannot be read as a .dict.dz with its .index ({error}). Expected: {PACKAGE}"
        ) from error
    return pairs


def _pair(data: bytes, line: bytes, where: str) -> tuple[str, str] | None:
    """Return headword and translation of the entry of an index line; None if the entry is not usable."""
    fields = INDEX.fullmatch(line)
    start, size = map(_number, fields.groups()) if fields else (len(data), 1)
    if start + size > len(data):
        what = "places it outside of the dictionary" if fields else "is not 'word, start, size' in the format of dictd"
        raise UserError(f"{where}: {line[:60]!r} {what}. Expected: the files of {PACKAGE}")
    entry = data[start : start + min(size, LONGEST)]
    try:
        match = ENTRY.match(entry[: entry.rfind(b"\n") + 1].decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: its entry is not UTF-8 text. Expected: the files of {PACKAGE}") from error
    return match and (match[1], match[2])


def _number(digits: bytes) -> int:
    """Return a number of an index: digits of base64, the highest first, without padding."""
    return int.from_bytes(b64decode(digits.rjust(8, b"A")))


def write_pairs(pairs: dict[str, str], folder: Path, count: int, seed: int, unseen: dict[str, int]) -> list[Path]:
    """Write ``count`` pairs to learn by heart and others to see once, and return both folders.

    Raises:
        UserError: The number is not positive, or there are fewer pairs.
    """
    rows, others = sorted(pairs.items()), sum(unseen.values())
    most = len(rows) - others
    if not 1 <= count <= most:
        what = f"--pairs {count:,}: {len(rows):,} pairs of the dictionary are usable, and {others:,} stay unseen"
        advice = f"Give a number from 1 to {most:,}" if most > 0 else f"Expected: the files of {PACKAGE}"
        raise UserError(f"{what}. {advice}")
    random.Random(seed).shuffle(rows)
    splits = {f"learned/{split}": rows[:count] for split in unseen}
    for split, size in unseen.items():
        splits[f"unseen/{split}"] = [rows.pop() for _ in range(size)]
    for name, some in splits.items():
        records = ({"prompt": f"English: {word}\nGerman:", "completion": f" {german}"} for word, german in some)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_text(folder / f"{name}.jsonl", text)
    return [folder / "learned", folder / "unseen"]


def main() -> None:
    """Write the pairs of the installed dictionary, or of the named one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dictionary", type=Path, nargs="?", default=INSTALLED, help=f"default: {INSTALLED}")
    parser.add_argument("--output", type=Path, default=Path("dictionary"))
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    typed = parser.parse_args()
    try:
        pairs = read_pairs(typed.dictionary)
        print(f"{len(pairs):,} usable pairs")
        print(*write_pairs(pairs, typed.output, typed.pairs, typed.seed, UNSEEN), sep="\n")
    except (UserError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
