"""Options of ``predict``, for images and for texts."""

import argparse
import math
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from randlora_pl.cli.common.arguments import Parser
from randlora_pl.utils.errors import UserError

_OF_IMAGES = ("weights", "on_error", "max_pixels")
MAX_PIXELS = 50_000_000
"""Most pixels of an image, as in `serve`: decoding takes at least 4 bytes per pixel."""

_OF_TEXTS = ("max_new_tokens", "beams", "precision")


def parse(args: list[str]) -> argparse.Namespace:
    """Return the options of ``predict``.

    Raises:
        UserError: An unknown, missing or impossible option.
    """
    parser = Parser("predict")
    parser.add_argument("--adapter", nargs="+", action="extend", required=True)
    parser.add_argument("--weights", type=float, nargs="+")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--images", type=Path, nargs="+")
    what.add_argument("--texts", nargs="+")
    parser.add_argument("--output", default="predictions.csv")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--top-k", "--top_k", type=int)
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int)
    parser.add_argument("--beams", type=int)
    parser.add_argument("--precision", choices=("32", "bf16"))
    parser.add_argument("--batch-size", "--batch_size", type=int)
    parser.add_weights()
    parser.add_argument("--device", default="auto")
    parser.add_argument("--on-error", "--on_error", choices=("raise", "skip"))
    parser.add_argument("--max-pixels", "--max_pixels", type=int)
    options = parser.parse_args(args)
    if not options.images and not options.texts:
        raise UserError("predict: give --images PATH, or for a language model --texts FILE.")
    for name in ("top_k", "batch_size", "max_new_tokens", "beams", "max_pixels"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{_typed(name)} is {value}: give a positive whole number.")
    here, there, foreign = ("images", "texts", _OF_TEXTS) if options.images else ("texts", "images", _OF_IMAGES)
    for name in foreign:
        if getattr(options, name) is not None:
            raise UserError(f"{_typed(name)} goes with --{there}, and these are --{here}: leave it out.")
    options.adapters = name_adapters(options.adapter)
    if options.weights is not None:
        if len(options.weights) != len(options.adapters):
            numbers, adapters = len(options.weights), len(options.adapters)
            raise UserError(f"--weights gives {numbers} numbers for {adapters} adapters: give one for each.")
        if not all(map(math.isfinite, options.weights)):
            raise UserError(f"--weights is {' '.join(map(str, options.weights))}: give finite numbers.")
        options.weights = dict(zip(options.adapters, options.weights, strict=True))
    return options


def _typed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
        found[name] = Path(path)
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
