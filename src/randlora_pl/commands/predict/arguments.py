"""Options of ``predict``, for images and for texts."""

import argparse
import math
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from randlora_pl.commands.common.arguments import CommandParser, check_positive, spelled
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.run_files import find_adapter

_OF_IMAGES = ("weights", "classnames", "on_error", "max_pixels")
MAX_PIXELS = 50_000_000
"""Most pixels of an image, as in `serve`: decoding takes at least 4 bytes per pixel."""

_OF_TEXTS = ("max_new_tokens", "beams")


def parse(args: list[str]) -> argparse.Namespace:
    """Return the options of ``predict``."""
    parser = CommandParser("predict")
    parser.add_argument("--adapter", nargs="+", action="extend", required=True)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--images", type=Path, nargs="+")
    what.add_argument("--texts", nargs="+")
    parser.add_options(weights=[float], output="predictions.csv", overwrite=False, top_k=int, max_new_tokens=int)
    parser.add_options(classnames=Path, beams=int, batch_size=int, device="auto", max_pixels=int)
    parser.add_precision()
    parser.add_options(on_error=("raise", "skip"))
    parser.add_weights()
    options = parser.parse_args(args)
    if not options.images and not options.texts:
        raise UserError("predict: give --images PATH, or for a language model --texts FILE.")
    check_positive(options, "top_k", "batch_size", "max_new_tokens", "beams", "max_pixels")
    here, there, foreign = ("images", "texts", _OF_TEXTS) if options.images else ("texts", "images", _OF_IMAGES)
    for name in foreign:
        if getattr(options, name) is not None:
            raise UserError(f"{spelled(name)} can only be used with --{there}, not with --{here}. Remove it.")
    options.adapters = name_adapters(options.adapter)
    if options.weights is not None:
        if len(options.weights) != len(options.adapters):
            numbers, adapters = len(options.weights), len(options.adapters)
            raise UserError(f"--weights gives {numbers} numbers for {adapters} adapters; give one per adapter.")
        if not all(map(math.isfinite, options.weights)):
            raise UserError(f"--weights is {' '.join(map(str, options.weights))}: give finite numbers.")
        options.weights = dict(zip(options.adapters, options.weights, strict=True))
    return options


def names_in(file: Path) -> list[str]:
    """Return the names of classes in a text file, one per line.

    Raises:
        UserError: The file cannot be read, or has fewer than two different names.
    """
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classnames {file} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"--classnames {file} has {len(names):,} names: give two or more, one per line, each once.")
    return names


def name_adapters(words: Sequence[str]) -> dict[str, Path]:
    """Return adapters by name: ``NAME=PATH``, or the part in which paths differ (``cars`` of ``runs/cars/adapter``).

    Raises:
        UserError: Two have the same name, or a name is empty.
    """
    pairs = [_pair(word) for word in words]
    short = _apart([Path(path.removesuffix(".safetensors")).parts for _, path in pairs])
    found: dict[str, Path] = {}
    for (given, path), default in zip(pairs, short, strict=True):
        name = given or default
        if name in found:
            raise UserError(f"--adapter has two called {name}, {found[name]} and {path}: give them names, NAME={path}")
        found[name] = find_adapter(path)
    return found


def _pair(word: str) -> tuple[str | None, str]:
    name, equals, path = word.partition("=")
    if not equals or "/" in name or Path(word).exists():
        return None, word
    if not name or not path:
        raise UserError(f"--adapter {word}: give NAME=FOLDER, or the folder alone.")
    return name, path


def _apart(paths: list[tuple[str, ...]]) -> list[str]:
    """Return the paths without the common parts at both ends; the last part if nothing is left."""
    head, tail = _in_common(paths), _in_common([path[::-1] for path in paths])
    return [str(Path(*(path[head : len(path) - tail] or path[-1:]))) for path in paths]


def _in_common(paths: list[tuple[str, ...]]) -> int:
    """Return the number of parts that all paths start with."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))
