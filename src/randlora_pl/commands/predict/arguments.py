"""Options of ``predict``, for images and for texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Literal

from randlora_pl.commands.common.arguments import spelled
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.run_files import find_adapter
from randlora_pl.utils.machine import Precision
from randlora_pl.utils.option_types import Device, File, Option, Overwrite, Weights
from randlora_pl.utils.options import Count, Finite

_OF_IMAGES = ("weights", "classnames", "on_error", "max_pixels")
_OF_TEXTS = ("max_new_tokens", "beams")


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of predictions.

    Attributes:
        adapter: Adapter folders, .safetensors files or runs. They know their base model, class names and prompts.
            Without NAME, the part of the path that differs is used.
        weights: Merge the adapters into one model with these weights. All adapters must have the same classes. With one
            adapter, its weight scales its update.
        images: Image files, and folders to search.
        classnames: Other classes than the adapter's, one name per line. Only prompts (PromptTask) can name them.
        texts: .txt with one text per line (- reads standard input), or .jsonl or .csv with the column prompt, text, or
            text_a and text_b. Labels and completions are ignored.
        output: CSV file to write, or - to print it.
        top_k: Number of classes listed per image or text (default: 5).
        max_new_tokens: Most tokens to generate per prompt (default: as in training).
        beams: Number of beams of the search, 1 is greedy (default: as in training).
        precision: tf32: faster products on NVIDIA GPUs from 2020 or later. bf16: as in training with bf16-mixed, which
            also halves the memory of a language model.
        batch_size: Images or texts per batch (default: 64, or 16 prompts).
        on_error: skip leaves out unreadable images (default: raise).
        max_pixels: Largest image, width x height (default: 50000000).
        pretrained: Weights file (or folder, for a language model) of a base model that this machine does not have.
            Repeat it for further base models.
    """

    adapter: Annotated[Sequence[str], Option("[NAME=]PATH")]
    weights: Sequence[Annotated[float, Finite]] | None = None
    images: Sequence[Path] = ()
    classnames: File | None = None
    texts: Annotated[Sequence[str], Option("FILE")] = ()
    output: Annotated[str, Option("FILE")] = "predictions.csv"
    overwrite: Overwrite = False
    top_k: Count | None = None
    max_new_tokens: Count | None = None
    beams: Count | None = None
    precision: Precision = "32"
    batch_size: Count | None = None
    device: Device = "auto"
    on_error: Literal["raise", "skip"] | None = None
    max_pixels: Count | None = None
    pretrained: Weights = ()

    def __post_init__(self) -> None:
        if bool(self.images) == bool(self.texts):
            both = "--images and --texts are not allowed together; " if self.images else ""
            raise UserError(f"predict: {both}give --images PATH, or for a language model --texts FILE.")
        here, there, foreign = ("images", "texts", _OF_TEXTS) if self.images else ("texts", "images", _OF_IMAGES)
        for name in foreign:
            if getattr(self, name) is not None:
                raise UserError(f"{spelled(name)} can only be used with --{there}, not with --{here}. Remove it.")
        if self.weights is not None and len(self.weights) != len(self.adapters):
            numbers, adapters = len(self.weights), len(self.adapters)
            raise UserError(f"--weights gives {numbers} numbers for {adapters} adapters; give one per adapter.")

    @cached_property
    def adapters(self) -> dict[str, Path]:
        """The adapters by name."""
        return name_adapters(self.adapter)

    @property
    def weighted(self) -> dict[str, float] | None:
        """The weights by name."""
        return None if self.weights is None else dict(zip(self.adapters, self.weights, strict=True))


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
