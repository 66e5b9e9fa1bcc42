"""``predict``: classes of images, from adapter files alone, in one pass for several of them."""

import argparse
import csv
import io
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from randlora_pl.cli.pages import page
from randlora_pl.cli.parsing import Parser
from randlora_pl.cli.runs import adapter_config
from randlora_pl.errors import UserError

_HELD = 1 << 28
"""Bytes of images that wait until every adapter has had its turn: a switch takes as long as 25 images (tiny CLIP)."""


def parse(args: list[str]) -> argparse.Namespace:
    """The options of ``predict``.

    Raises:
        UserError: An unknown, missing or impossible option.
    """
    parser = Parser("predict")
    parser.add_argument("--adapter", nargs="+", action="extend", required=True)
    parser.add_argument("--weights", type=float, nargs="+")
    parser.add_argument("--images", type=Path, nargs="+", required=True)
    parser.add_argument("--output", default="predictions.csv")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--top-k", "--top_k", type=int, default=5)
    parser.add_argument("--batch-size", "--batch_size", type=int, default=64)
    parser.add_weights()
    parser.add_argument("--device", default="auto")
    parser.add_argument("--on-error", "--on_error", choices=("raise", "skip"), default="raise")
    options = parser.parse_args(args)
    for name in ("top_k", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}: give a positive whole number.")
    options.adapters = name_adapters(options.adapter)
    if options.weights is not None:
        if len(options.weights) != len(options.adapters):
            numbers, adapters = len(options.weights), len(options.adapters)
            raise UserError(f"--weights gives {numbers} numbers for {adapters} adapters: give one for each.")
        if not all(map(math.isfinite, options.weights)):
            raise UserError(f"--weights is {' '.join(map(str, options.weights))}: give finite numbers.")
        options.weights = dict(zip(options.adapters, options.weights, strict=True))
    return options


def name_adapters(words: Sequence[str]) -> dict[str, Path]:
    """Adapters by name: ``NAME=PATH``, or what tells the paths apart (``cars`` of ``runs/cars/adapter``).

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
    """Paths without the parts at both ends that all have in common; the last part where nothing is left."""
    head, tail = _in_common(paths), _in_common([path[::-1] for path in paths])
    return [str(Path(*(path[head : len(path) - tail] or path[-1:]))) for path in paths]


def _in_common(paths: list[tuple[str, ...]]) -> int:
    """Number of parts that all paths start with."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


def predict_verb(args: list[str]) -> int:
    """Check what was typed, load the adapters, classify, write the CSV file."""
    if not args:
        print(page("predict"), end="")
        return 0
    options = parse(args)
    for folder in options.adapters.values():
        adapter_config(folder)
    output = None if options.output == "-" else Path(options.output)
    if output is not None and output.exists() and not options.overwrite:
        raise UserError(f"{output} exists; give another --output, or --overwrite to replace it.")
    if output is not None and output.is_dir():
        raise UserError(f"--output: {output} is a folder; name a file.")
    if output is not None and not output.parent.is_dir():
        raise UserError(f"The folder {output.parent} does not exist; make it first: mkdir -p {output.parent}")
    answers = classify(options)
    text = answers.csv()
    if output is None:
        sys.stdout.write(text)
        return 0
    from randlora_pl.callbacks.run_folder import write_text

    write_text(output, text)
    left_out = f"; {answers.skipped:,} unreadable images are left out" if answers.skipped else ""
    print(f"{output}: {answers.summary(options.weights)}, the best {answers.classes} classes of each{left_out}")
    return 0


class Answers:
    """What adapters say of images.

    Args:
        names: Of the adapters, or of the one sum.
        classes: The most classes of an image to list.

    Attributes:
        skipped: Number of images that were left out.
    """

    def __init__(self, names: list[str], classes: int) -> None:
        self.names, self.classes, self.skipped = names, classes, 0
        self._lines: list[tuple[int, int, list[str]]] = []  # place of the image, of the adapter; cells

    def add(self, name: str, classnames: list[str], batch: dict[str, Any], shares: Any, images: list[Path]) -> None:
        """Takes the best classes of a batch.

        Args:
            name: Of the adapter.
            classnames: Its classes.
            batch: With ``index`` (b,), the places of the images, and ``readable`` (b,).
            shares: Probability of each class, (b, classes).
            images: Files of all images.
        """
        known = batch["readable"]
        best = shares[known].topk(min(self.classes, len(classnames)))
        places = batch["index"][known].tolist()
        for place, labels, values in zip(places, best.indices.tolist(), best.values.tolist(), strict=True):
            pairs = [(classnames[label], f"{value:.6f}") for label, value in zip(labels, values, strict=True)]
            cells = [str(images[place]), *(text for pair in pairs for text in pair)]
            self._lines.append((place, self.names.index(name), cells))

    def csv(self) -> str:
        """The file: a line for each image; with several adapters one for each of them, named in a second column."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        several = len(self.names) > 1
        more = [name for place in range(2, self.classes + 1) for name in (f"class_{place}", f"probability_{place}")]
        writer.writerow(["image", *(["adapter"] if several else []), "class", "probability", *more])
        for _, adapter, (image, *cells) in sorted(self._lines):
            blank = [""] * (2 * self.classes - len(cells))  # an adapter of fewer classes
            writer.writerow([image, *([self.names[adapter]] if several else []), *cells, *blank])
        return text.getvalue()

    def summary(self, weights: dict[str, float] | None) -> str:
        """How many images, and by what."""
        images = f"{len(self._lines) // len(self.names):,} images"
        if weights is not None:
            return f"{images}, {' + '.join(f'{weight:g} {name}' for name, weight in weights.items())}"
        return images if len(self.names) == 1 else f"{images}, {len(self.names)} adapters ({', '.join(self.names)})"


def classify(options: argparse.Namespace) -> Answers:
    """The best classes of each image by each adapter, with their probabilities.

    Images are decoded once for each way in which adapters want them prepared, as a rule one. Some wait until every
    adapter has had its turn, merged: a switch costs more than a small batch.

    Raises:
        UserError: An adapter or an image does not load, the device is not there, or memory runs out.
    """
    from randlora_pl.cli.explain import out_of_memory
    from randlora_pl.cli.train import quieten

    quieten()
    import torch

    from randlora_pl.adapters import read_adapter
    from randlora_pl.data import open_images
    from randlora_pl.data.predict import frame_of
    from randlora_pl.tasks import load_tasks, weighted_task

    device = pick_device(options.device)
    files = {name: read_adapter(path) for name, path in options.adapters.items()}
    tasks = load_tasks(files)
    if options.weights is not None:
        tasks = {next(iter(tasks)): weighted_task(tasks, options.weights)}
    frames = [frame_of(files[name].metadata, task.image_spec) for name, task in tasks.items()]
    skip = options.on_error == "skip"
    opened = {frame: open_images(options.images, frame, options.batch_size, skip=skip) for frame in frames}
    loaders, images = [loader for loader, _ in opened.values()], opened[frames[0]][1]
    answers = Answers(list(tasks), max(min(options.top_k, len(task.classnames)) for task in tasks.values()))
    turns = list(zip(tasks, tasks.values(), [list(opened).index(frame) for frame in frames], strict=True))
    try:
        for task in tasks.values():
            task.to(device)
            task.prepare_evaluation()
        with torch.inference_mode():
            for held in _together(zip(*loaders, strict=True), _HELD if len(turns) > 1 else 0):
                for name, task, form in turns:
                    for batch in (batches[form] for batches in held):
                        shares = task.class_logits(batch["image"].to(device)).float().softmax(1).cpu()
                        answers.add(name, task.classnames, batch, shares, images)
                turns.reverse()  # the last adapter is in the model already
    except UserError as error:  # an unreadable image; the advice for data sets does not fit here
        what = str(error).partition(" Replace it")[0]
        raise UserError(f"{what} Leave it out of --images, or go on without it: --on-error skip") from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"out of memory; try --batch-size {max(1, options.batch_size // 2)}") from error
    answers.skipped = len(loaders[0].skipped)
    return answers


def _together(batches: Iterator[tuple[dict[str, Any], ...]], limit: int) -> Iterator[list[tuple[dict[str, Any], ...]]]:
    """Batches in groups of at least ``limit`` bytes of images."""
    held: list[tuple[dict[str, Any], ...]] = []
    size = 0
    for forms in batches:
        held.append(forms)
        size += sum(batch["image"].nbytes for batch in forms)
        if size >= limit:
            yield held
            held, size = [], 0
    if held:
        yield held


def pick_device(name: str) -> Any:
    """A device of this machine; ``auto`` takes the fastest there is.

    Raises:
        UserError: There is no such device.
    """
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
        raise UserError(f"--device {name} is no device: give cpu, cuda, cuda:1 and so on.") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise UserError(f"--device {name} is not on this machine; the last one is {device.type}:{count - 1}.")
    return device
