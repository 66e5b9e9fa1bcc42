"""Checks of what the user typed for the data, before anything is read. Imports no PyTorch, so that they are instant."""

import math
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from randlora_pl.data.catalog.spec import Row
from randlora_pl.data.images.frame import INTERPOLATIONS, RESIZES
from randlora_pl.utils.cores import usable_cores
from randlora_pl.utils.errors import UserError, brief, near

BALANCES = ("weights", "sampler")
SAMPLING = ("with_replacement", "epochs")
_LARGEST_BATCH = 2**24
MAGNITUDES = 31
"""Strengths of RandAugment, from 0."""


def check(values: Mapping[str, Any], row: Row) -> None:
    """All checks below of `ImageData`'s options but those of prompts and of the task.

    Args:
        values: Each option by name.
        row: The data set.

    Raises:
        UserError: Names the first option that cannot be.
    """
    known = {**values, "captions": row.captions, "without_classes": "captions" if row.captions else ""}
    for each in (check_subset, check_run, check_balance, check_augment, check_resize, check_frame):
        each(**{name: known[name] for name in signature(each).parameters})
    if values["root"] is None and row.own:
        raise UserError(f"The data set {row.name!r} needs --data.root: {row.source} ({row.layout})")


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"--data.{name} {value!r} is unknown.{near(value, choices)} Known: {', '.join(choices)}")


def _positive(name: str, value: int | None, least: int = 1, most: int = 10**9) -> None:
    if value is not None and value < least:
        raise UserError(f"--data.{name} is {value}, but must be at least {least}")
    if value is not None and value > most:  # draws are counted in 64 bits
        raise UserError(f"--data.{name} is {brief(value)}, but must be at most {most:,}")


def check_subset(shots: int | None, fraction: float | None, train_split: str, captions: bool) -> None:
    """Few-shot and fraction options; ``captions``: the data set has no classes."""
    _positive("shots", shots)
    if shots is not None and fraction is not None:
        raise UserError(f"--data.shots {shots} and --data.fraction {fraction} exclude each other: give one of them")
    if fraction is not None and not 0 < fraction < 1:
        raise UserError(f"--data.fraction is {fraction}, but must lie between 0 and 1; leave it out to use all images")
    if shots is not None and captions:
        raise UserError("--data.shots needs classes, and captions have none: use --data.fraction")
    _one_of("train_split", train_split, ("train", "full"))


def check_run(
    batch_size: int,
    eval_batch_size: int,
    epochs: int | None,
    steps: int | None,
    min_batches_per_epoch: int,
    sampling: str,
    num_workers: int | None,
) -> None:
    """Batch sizes, length of the run and sampling."""
    _positive("batch_size", batch_size, most=_LARGEST_BATCH)
    _positive("eval_batch_size", eval_batch_size, most=_LARGEST_BATCH)
    _positive("epochs", epochs)
    _positive("steps", steps)
    if epochs is not None and steps is not None:
        raise UserError(f"--data.epochs {epochs} and --data.steps {steps} exclude each other: give one of them")
    _positive("min_batches_per_epoch", min_batches_per_epoch, 0)
    _positive("num_workers", num_workers, 0)
    most = max(64, 4 * usable_cores())  # each is a process of some hundred megabytes
    if num_workers is not None and num_workers > most:
        raise UserError(f"--data.num_workers is {num_workers}, but at most {most} can help here: 4 per core, or 64")
    _one_of("sampling", sampling, SAMPLING)


def check_balance(balance: str | None, without_classes: str = "") -> None:
    """Correction for classes of different size.

    Args:
        balance: What was typed.
        without_classes: What the samples have instead of classes; empty where they have classes.
    """
    if balance is not None:
        _one_of("balance", balance, BALANCES)
        if without_classes:
            raise UserError(f"--data.balance {balance} needs classes, and {without_classes} have none: leave it out")


def check_resize(resize: str | None) -> None:
    """How images become square."""
    if resize is not None:
        _one_of("resize", resize, RESIZES)


def check_augment(randaugment: int | None, mixup: float | None, cutmix: float | None, captions: bool) -> None:
    """Augmentation of training images; ``captions``: the data set has no classes."""
    if randaugment is not None and not 0 <= randaugment < MAGNITUDES:
        raise UserError(f"--data.randaugment is {randaugment}: give a strength from 0 to {MAGNITUDES - 1}; 9 is usual")
    for name, value in (("mixup", mixup), ("cutmix", cutmix)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--data.{name} is {value}: give a positive number, or leave it out for none")
        if value is not None and captions:
            raise UserError(f"--data.{name} blends labels of classes, and captions have none: leave it out")


def check_softmax(mixup: float | None, cutmix: float | None, task: str, blended_labels: bool) -> None:
    """Refuse blended labels in a task that does not learn a share of each class."""
    if (mixup is not None or cutmix is not None) and not blended_labels:
        name = "mixup" if mixup is not None else "cutmix"
        raise UserError(
            f"--data.{name} needs a softmax over all classes, and {task} compares an image with the "
            "captions of its batch: leave it out, or use --model LinearHeadTask or TextHeadTask"
        )


def read_templates(templates: Sequence[str] | str | None) -> list[str] | None:
    """The prompts that were typed, or those of a text file, one a line; a text with {} is a single prompt.

    Raises:
        UserError: The file is missing, empty or no text, or one of its lines lacks {}.
    """
    if not isinstance(templates, str):
        return None if templates is None else list(templates)
    path = Path(templates).expanduser()
    if not path.is_file():
        if "{}" in templates:
            return [templates]
        raise UserError(
            f"The prompt file {path} does not exist (--data.templates); a prompt itself has {{}} for the class name"
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The prompt file {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if line and line.count("{}") != 1:
            raise UserError(f"{path}, line {number}: {line!r} must have {{}} once, where the class name goes")
    if not any(lines):
        raise UserError(f"The prompt file {path} is empty: write one a line, such as: a photo of a {{}}.")
    return [line for line in lines if line]


def check_frame(
    crop_scale: Sequence[float],
    image_size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    interpolation: str | None,
    on_error: str,
) -> None:
    """Transforms, and what to do at an unreadable image."""
    if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise UserError(
            f"--data.crop_scale is {list(crop_scale)}, but must be two shares with 0 < least <= greatest <= 1"
        )
    _positive("image_size", image_size)
    if mean is not None and len(mean) != 3:
        raise UserError(f"--data.mean has {len(mean)} values, but needs 3")
    if std is not None and (len(std) != 3 or min(std) <= 0):
        raise UserError(f"--data.std is {list(std)}, but needs 3 values above 0")
    if interpolation is not None:
        _one_of("interpolation", interpolation, INTERPOLATIONS)
    _one_of("on_error", on_error, ("raise", "skip"))


def check_templates(templates: Sequence[str] | None, captions: bool) -> None:
    """Prompts; ``captions``: the data set has no classes."""
    if templates is not None and captions:
        raise UserError("--data.templates goes with classes; captions are taken as they are")
    if templates is not None and not templates:
        raise UserError("--data.templates is empty: give at least one, such as ['a photo of a {}.']")
    for template in templates or ():
        if template.count("{}") != 1:
            raise UserError(f"The template {template!r} must have {{}} once, where the class name goes")
