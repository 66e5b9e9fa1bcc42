"""``predict``: classes of images from adapter files alone, in one pass for several adapters; not for texts."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from randlora_pl.commands.common.arguments import check_output, check_parent
from randlora_pl.commands.common.devices import advised, pick_device
from randlora_pl.commands.predict.arguments import PredictOptions, names_in
from randlora_pl.language.catalog import TASKS
from randlora_pl.run.options.adapter_config import adapter_config
from randlora_pl.serving.options import MAX_PIXELS
from randlora_pl.serving.prediction_table import PredictionTable
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import atomic_file
from randlora_pl.utils.files.weights_files import register_weights
from randlora_pl.utils.machine import use_precision
from randlora_pl.utils.quick_imports import quick_imports
from randlora_pl.utils.text.console import silence_library_warnings
from randlora_pl.utils.text.formatting import printable

_HELD = 1 << 28
"""Bytes of images per switch of adapters: a switch takes as long as 25 images (tiny CLIP)."""


def predict(options: PredictOptions) -> int:
    """Classify images or texts with a trained adapter, or answer prompts.

    The result is a CSV file with the columns image, class, probability and the next best classes. For texts the first
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
        _check_kind(folder, adapter_config(folder)["model"]["class_path"], bool(options.texts))
    output = None if options.output == "-" else Path(options.output)
    if output is None:
        text = _found(options).csv()
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        return 0
    check_output(output, options.overwrite)
    if output.exists() and not output.is_file():
        raise UserError(f"--output: {output} is a folder or a device; name a file.")
    check_parent(output)
    found = None
    try:
        with atomic_file(output) as file:  # before the work, which may take hours
            found = _found(options)
            file.write(found.csv().encode())
    except OSError as error:
        if found is None:
            raise
        raise UserError(_kept_elsewhere(found.csv().encode(), output, error)) from error
    print(f"{output}: {found.summary(options.weighted)}")
    return 0


def _found(options: PredictOptions) -> PredictionTable:
    silence_library_warnings()
    if not options.texts:
        return classify(options)
    from randlora_pl.commands.predict.texts import answer

    return answer(options)


def _kept_elsewhere(content: bytes, output: Path, error: OSError) -> str:
    """Write predictions to the folder of temporary files, and return a message that names the file."""
    what = f"{output} cannot be written: {error.strerror or error}"
    try:
        with tempfile.NamedTemporaryFile(prefix="predictions-", suffix=".csv", delete=False) as file:
            file.write(content)
    except OSError:
        return f"{what}. Free some space, then predict again"
    return f"{what}. The predictions are in {file.name}"


def _check_kind(folder: Path, task: str, texts: bool) -> None:
    """Refuse images for a language model, and texts for a model of images."""
    if texts and task not in TASKS:
        raise UserError(f"{folder} belongs to a model of images: give it --images PATH instead of --texts.")
    if not texts and task in TASKS:
        raise UserError(f"{folder} belongs to a language model: give it --texts FILE instead of --images.")


def classify(options: PredictOptions) -> PredictionTable:
    """Return the best classes of each image by each adapter, with their probabilities.

    Images are decoded once per preprocessing of the adapters, usually one. Each group of images is held until every
    adapter, merged, has classified it: a switch costs more than a small batch.

    Raises:
        UserError: An adapter or an image does not load, the device or its precision is not there, or memory runs out.
    """
    with quick_imports("torchmetrics", "open_clip"):
        import torch

        from randlora_pl.data import open_images
        from randlora_pl.data.sources import trust_the_limit
        from randlora_pl.data.unlabelled import find_images
        from randlora_pl.tasks import PromptTask, load_tasks, weighted_task

    find_images(options.images)  # before the models, which take seconds to load
    device = pick_device(options.device)
    precision = use_precision(options.precision, device)
    tasks = load_tasks(options.adapters)
    if options.weighted is not None:
        tasks = {next(iter(tasks)): weighted_task(tasks, options.weighted)}
    if options.classnames:
        names = names_in(options.classnames)
        for name, task in tasks.items():
            if not isinstance(task, PromptTask):
                raise UserError(f"--classnames: {name} cannot name other classes, only a PromptTask can. Remove it.")
            task.set_classes(names, task.templates)
    frames = [task.frame for task in tasks.values()]
    skip = options.on_error == "skip"
    batch_size = options.batch_size or 64
    most = options.max_pixels or MAX_PIXELS
    trust_the_limit()
    opened = {frame: open_images(options.images, frame, batch_size, skip=skip, most_pixels=most) for frame in frames}
    loaders, images = [loader for loader, _ in opened.values()], opened[frames[0]][1]
    count = max(min(options.top_k or 5, len(task.classnames)) for task in tasks.values())
    found = PredictionTable.of_classes(list(tasks), "images", ["image"], [[str(image)] for image in images], count)
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
                        probabilities = task.class_logits(batch["image"].to(device)).float().softmax(1).cpu()
                        known = batch["weight"] > 0
                        found.add_classes(name, batch["index"][known].tolist(), task.classnames, probabilities[known])
                turns.reverse()  # the last adapter is already in the model
    if skipped := len(loaders[0].skipped):
        found.note += f"; unreadable and skipped: {skipped:,}"
    return found


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
