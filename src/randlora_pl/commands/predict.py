"""``predict``: classes of images and texts, scores, and answers to prompts, from adapter files alone."""

import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from randlora_pl import adapters
from randlora_pl.commands.common import advised, check_file, pick_device, spelled
from randlora_pl.language import prompt_sets as inputs
from randlora_pl.language.catalog import TASKS
from randlora_pl.run.options.saved_config import adapter_config
from randlora_pl.serving import MAX_PIXELS
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import atomic_file
from randlora_pl.utils.machine import Precision, use_precision
from randlora_pl.utils.options import Count, Device, File, Finite, Option, Overwrite, Weights
from randlora_pl.utils.quick_imports import quick_imports
from randlora_pl.utils.run_files import find_adapter
from randlora_pl.utils.text import csv_text, log_to_terminal, printable
from randlora_pl.utils.weights_files import register_weights

if TYPE_CHECKING:
    from torch import Tensor

    from randlora_pl.language.tasks.common import TextTask
    from randlora_pl.tasks.objective import Objective


Files = dict[str, "adapters.AdapterFile"]


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of predictions.

    Attributes:
        adapter: Adapter folders, .safetensors files or runs. They store base model name, class names and prompts.
            Without NAME, the part of the path that differs is used.
        weights: Merge the adapters into one model with these weights. All adapters must have the same classes. With one
            adapter, its weight scales its update.
        images: Image files, and folders to search.
        classnames: Classes to predict instead of the adapter's, one name per line. For prompts (PromptTask) only.
        texts: .txt with one text per line (- reads standard input), or .jsonl or .csv with the column prompt, text, or
            text_a and text_b, or .jsonl with messages. Labels, completions and last answers are ignored.
        output: CSV file to write, or - to print it.
        top_k: Number of classes listed per image or text (default: 5).
        max_new_tokens: Maximum number of tokens to generate per prompt (default: as in training).
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
        here, there = ("images", "texts") if self.images else ("texts", "images")
        of_texts, of_images = ("max_new_tokens", "beams"), ("weights", "classnames", "on_error", "max_pixels")
        for name in of_texts if self.images else of_images:
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


def name_adapters(typed: Sequence[str]) -> dict[str, Path]:
    """Return adapters by name: ``NAME=PATH``, or the part in which paths differ (``cars`` of ``runs/cars/adapter``).

    Raises:
        UserError: Two have the same name, or a name is empty.
    """
    pairs = []
    for word in typed:
        name, equals, path = word.partition("=")
        if not equals or "/" in name or Path(word).exists():
            pairs.append(("", word))
        elif name and path:
            pairs.append((name, path))
        else:
            raise UserError(f"--adapter {word}: give NAME=FOLDER, or the folder alone.")
    parts = [Path(path.removesuffix(".safetensors")).parts for _, path in pairs]
    head, tail = _in_common(parts), _in_common([path[::-1] for path in parts])
    named: dict[str, Path] = {}
    for (given, path), each in zip(pairs, parts, strict=True):
        name = given or str(Path(*(each[head : len(each) - tail] or each[-1:])))
        if name in named:
            raise UserError(f"--adapter has two called {name}, {named[name]} and {path}: give them names, NAME={path}")
        named[name] = find_adapter(path)
    return named


def _in_common(paths: list[tuple[str, ...]]) -> int:
    """Return the number of parts that all paths start with."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


@dataclass
class PredictionTable:
    """Predictions of one or more adapters for images or texts.

    Attributes:
        names: Names of the adapters, or of their one weighted sum.
        unit: Kind of the inputs: ``images``, ``texts`` or ``prompts``.
        columns: Column names of the inputs.
        given: Cells of each input.
        predicted: Column names of an adapter's prediction.
        note: End of the summary.
        lines: Index of the input, index of the adapter, and at most as many cells as ``predicted``.
    """

    names: list[str]
    unit: str
    columns: Sequence[str]
    given: Sequence[Sequence[str]]
    predicted: Sequence[str] = ()
    note: str = ""
    lines: list[tuple[int, int, Sequence[str]]] = field(default_factory=list)

    def add(self, name: str, number: int, cells: Sequence[str]) -> None:
        """Add the prediction of an adapter for the input with an index."""
        self.lines.append((number, self.names.index(name), cells))

    def add_answers(
        self, name: str, numbers: Sequence[int], task: "Objective", predictions: "Tensor", most: int | None
    ) -> None:
        """Add the answers of an adapter for inputs with these indices, from its task's predictions (inputs, ...).

        Raises:
            UserError: The predictions are not numbers.
        """
        from randlora_pl.tasks.losses import check_numbers

        check_numbers(predictions, name)
        answers = task.answers(predictions, most or 5)
        if len(answers.columns) > len(self.predicted):
            self.predicted, self.note = answers.columns, answers.note
        for number, cells in zip(numbers, answers.rows, strict=True):
            self.add(name, number, cells)

    def csv(self) -> str:
        """Return the file: one line per input and adapter; with several adapters their name follows the input."""
        several = len(self.names) > 1
        rows = [[*self.columns, *(["adapter"] if several else []), *self.predicted]]
        for number, adapter, cells in sorted(self.lines):
            blank = [""] * (len(self.predicted) - len(cells))  # an adapter with fewer classes
            rows.append([*self.given[number], *([self.names[adapter]] if several else []), *cells, *blank])
        return csv_text(rows)

    def summary(self, weights: dict[str, float] | None) -> str:
        """Return a line with the number of inputs and the adapters, with their weights if they were added."""
        many = f"{len(self.lines) // len(self.names):,} {self.unit}"
        if weights is not None:
            many += f", {' + '.join(f'{weight:g} {name}' for name, weight in weights.items())}"
        elif len(self.names) > 1:
            many += f", {len(self.names)} adapters ({', '.join(self.names)})"
        return f"{many}, {self.note}"


_HELD = 1 << 28
"""Bytes of images per switch of adapters: a switch takes as long as 25 images (tiny CLIP)."""


def predict(options: PredictOptions) -> int:
    """Classify images or texts with a trained adapter, or answer prompts.

    The result is a CSV file with the columns image, class, probability and the next best classes. Adapters that learned
    several labels of an image add the column labels, with all classes of a probability above 0.5. For texts the first
    column is text, and for prompts the columns are prompt and written. Several adapters share one pass over the images
    and, if possible, one base model. The file then has a line per image and adapter.

    Examples:
        randlora-pl predict --adapter runs/quickstart/latest --images photos/ cat.jpg --output predictions.csv
        randlora-pl predict --adapter RUN --texts questions.txt
        randlora-pl predict --adapter runs/cars/latest pets=pets.safetensors --images photos/
        randlora-pl predict --adapter ADAPTER ADAPTER --weights 0.5 0.5 --images photos/
    """
    register_weights(options.pretrained)
    for folder in options.adapters.values():
        of_texts = adapter_config(folder)["model"]["class_path"] in TASKS
        if options.texts and not of_texts:
            raise UserError(f"{folder} belongs to a model of images: give it --images PATH instead of --texts.")
        if of_texts and not options.texts:
            raise UserError(f"{folder} belongs to a language model: give it --texts FILE instead of --images.")
    compute = answer if options.texts else classify
    output = None if options.output == "-" else Path(options.output)
    if output is None:
        text = compute(options).csv()
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        return 0
    check_file(output, options.overwrite)
    predictions = None
    try:
        with atomic_file(output) as file:  # before the work, which may take hours
            predictions = compute(options)
            file.write(predictions.csv().encode())
    except OSError as error:
        if predictions is None:
            raise
        what = f"{output} cannot be written: {error.strerror or error}"
        try:
            with tempfile.NamedTemporaryFile(prefix="predictions-", suffix=".csv", delete=False) as elsewhere:
                elsewhere.write(predictions.csv().encode())
            what += f". The predictions are in {elsewhere.name}"
        except OSError:
            what += ". Free some space, then predict again"
        raise UserError(what) from error
    print(f"{output}: {predictions.summary(options.weighted)}")
    return 0


def classify(options: PredictOptions) -> PredictionTable:
    """Return the best classes of each image by each adapter, with their probabilities.

    Images are decoded once per preprocessing of the adapters, usually one. Each group of images is held until every
    adapter, merged, has classified it: a switch costs more than a small batch.

    Raises:
        UserError: An adapter or an image does not load, the device or its precision is not there, or memory runs out.
    """
    with quick_imports("torchmetrics", "open_clip"):
        import torch

        from randlora_pl.data import sources, unlabelled
        from randlora_pl.tasks import load_tasks, weighted_task

    unlabelled.find_images(options.images)  # before the models, which take seconds to load
    device = pick_device(options.device)
    precision = use_precision(options.precision, device)
    tasks = load_tasks(options.adapters)
    if options.weighted is not None:
        tasks = {next(iter(tasks)): weighted_task(tasks, options.weighted)}
    if options.classnames:
        names = names_in(options.classnames)
        for name, task in tasks.items():
            if not task.names_others:
                raise UserError(f"--classnames: only a PromptTask can predict other classes, not {name}. Remove it.")
            task.set_classes(names, task.templates)
    _check_outputs(tasks, {(task.has_classes, task.answer, task.several) for task in tasks.values()})
    _refuse(options, [] if next(iter(tasks.values())).has_classes else ["top_k"])
    frames = [task.frame for task in tasks.values()]
    skip = options.on_error == "skip"
    batch_size = options.batch_size or 64
    most = options.max_pixels or MAX_PIXELS
    sources.trust_the_limit()
    opened = {
        frame: unlabelled.open_images(options.images, frame, batch_size, skip=skip, most_pixels=most)
        for frame in frames
    }
    loaders, images = [loader for loader, _ in opened.values()], opened[frames[0]][1]
    table = PredictionTable(list(tasks), "images", ["image"], [[str(image)] for image in images])
    turns = list(zip(tasks, tasks.values(), [list(opened).index(frame) for frame in frames], strict=True))
    leave = "Remove it from --images, {}or skip it: --on-error skip"
    hints = leave.format(""), leave.format("allow it with --max-pixels N, ")
    with advised(f"--batch-size {max(1, batch_size // 2)}", *hints):
        for task in tasks.values():
            task.to(device)
            task.prepare_evaluation()
        with torch.inference_mode(), precision:
            for held in _together(zip(*loaders, strict=True), _HELD if len(turns) > 1 else 0):
                for name, task, form in turns:
                    for batch in (batches[form] for batches in held):
                        scores = task.predictions(task.class_logits(batch["image"].to(device))).cpu()
                        known = batch["weight"] > 0
                        numbers = batch["index"][known].tolist()
                        table.add_answers(name, numbers, task, scores[known], options.top_k)
                turns.reverse()  # the last adapter is already in the model
    if skipped := len(loaders[0].skipped):
        table.note += f"; unreadable and skipped: {skipped:,}"
    return table


def _together(batches: Iterator[tuple[dict[str, Any], ...]], limit: int) -> Iterator[list[tuple[dict[str, Any], ...]]]:
    """Yield batches in groups of at least ``limit`` bytes of images."""
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


def answer(options: PredictOptions) -> PredictionTable:
    """Return the predictions of each adapter for each text; adapters take turns, each with its own base model.

    All inputs are read and checked before the first model is loaded.
    """
    from randlora_pl.language.tasks.common import TextTask
    from randlora_pl.language.tokenization import need_transformers
    from randlora_pl.tasks.restore import named_task

    need_transformers()
    log_to_terminal()  # logs how many texts are cut
    use_precision(options.precision, pick_device(options.device))  # refused before a model is loaded
    files = {name: adapters.read_adapter(path) for name, path in options.adapters.items()}
    kinds = {(file.metadata["task"], bool(file.metadata["classnames"])) for file in files.values()}
    _check_outputs(files, kinds)
    ((name, classes),) = kinds
    kind = named_task(name)
    assert kind is not None and issubclass(kind, TextTask)
    decoder = kind.generates
    _refuse(options, ([] if decoder else ["max_new_tokens", "beams"]) + ([] if classes else ["top_k"]))
    size = options.batch_size or kind.batch_size
    kinds_of_text = inputs.PROMPTS if decoder else inputs.SENTENCES
    given = [each for source in options.texts for each in inputs.read_given(source, kinds_of_text)]
    with advised(f"--batch-size {size // 2}" if size > 1 else "--precision bf16"):
        if decoder:
            return _write_answers(options, files, given, size)
        return _classify_texts(options, files, given, size)


def _check_outputs(names: Iterable[str], kinds: Collection[object]) -> None:
    """Refuse adapters of different kinds of outputs, which one table cannot hold."""
    if len(kinds) > 1:
        raise UserError(
            f"{', '.join(names)} have different outputs (text, classes, labels, scores). Predict each kind separately."
        )


_NEEDS = {"max_new_tokens": "generates text", "beams": "generates text", "top_k": "predicts classes"}


def _refuse(options: PredictOptions, useless: Sequence[str]) -> None:
    """Refuse the first given option that the adapters have no use for."""
    for name in useless:
        if getattr(options, name) is not None:
            adapter = next(iter(options.adapters.values()))
            raise UserError(
                f"{spelled(name)} needs a model that {_NEEDS[name]}, and {adapter} is not one. Remove the option."
            )


def _write_answers(options: PredictOptions, files: Files, given: list[inputs.Given], size: int) -> PredictionTable:
    from randlora_pl.language.tasks.causal_lm import paragraph

    datasets = {name: str(file.metadata.get("training", {}).get("dataset", "")) for name, file in files.items()}
    prompts = {name: [inputs.prompt_of(each, dataset) for each in given] for name, dataset in datasets.items()}
    asked = [[inputs.shown(each)] for each in given]
    table = PredictionTable(list(files), "prompts", ["prompt"], asked, ["written"])
    typed = {"max_new_tokens": options.max_new_tokens, "num_beams": options.beams}
    how = {name: value for name, value in typed.items() if value is not None}
    notes = set()
    for name, file in files.items():
        task = _ready(file, options, how)
        described = datasets[name] == "e2e"
        with use_precision(options.precision, pick_device(options.device)):
            texts = task.write(prompts[name], size, separate=described)
        for number, text in enumerate(texts):
            table.add(name, number, [paragraph(text) if described else text])
        notes.add(f"at most {task.max_new_tokens} tokens after each")
        del task  # before the next one is loaded
    table.note = " or ".join(sorted(notes))
    return table


def _classify_texts(options: PredictOptions, files: Files, given: list[inputs.Given], size: int) -> PredictionTable:
    from randlora_pl.language.tokenization import most_tokens

    sentences = [inputs.sentences_of(each) for each in given]
    for each, texts in zip(given, sentences, strict=True):
        if len(texts) != len(sentences[0]):
            raise UserError(f"{each.where}: single texts and pairs are mixed. Predict them separately.")
    pairs = len(sentences[0]) > 1
    columns = ["text_a", "text_b"] if pairs else ["text"]
    for file in files.values():
        trained = file.metadata.get("training", {}).get("pairs", pairs)
        if trained != pairs:
            what, names = ("pairs", "text_a and text_b") if trained else ("single texts", "text")
            raise UserError(f"{file.path} was trained on {what}: give records with {names}, as in its training.")
    table = PredictionTable(list(files), "texts", columns, sentences)
    for name, file in files.items():
        task = _ready(file, options, {})
        length = int(file.metadata.get("training", {}).get("max_length", 128))
        length = min(length, most_tokens(task.model) or length)
        with use_precision(options.precision, pick_device(options.device)):
            predictions = task.classify(sentences, length, size).float().cpu()
        table.add_answers(name, range(len(given)), task, predictions, options.top_k)
        del task
    return table


def _ready(file: "adapters.AdapterFile", options: PredictOptions, how: dict[str, Any]) -> "TextTask":
    """Return the task of an adapter on the device, merged; quantized as in its training if there is a GPU."""
    from randlora_pl.language.tasks.common import plain_task
    from randlora_pl.tasks.restore import make_ready

    if options.pretrained:
        how = {**how, "pretrained": str(options.pretrained[-1])}
    if options.precision == "bf16" and file.adapter.freezes:  # else there is nothing frozen to cast
        how = {**how, "frozen_dtype": "bfloat16"}
    device = pick_device(options.device)
    task = plain_task(file, dequantized=device.type != "cuda", **how)
    return make_ready(task, file).to(device)
