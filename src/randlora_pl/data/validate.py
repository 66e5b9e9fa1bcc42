"""Instant checks of the data options before anything is read, and the class names and prompts of a user. No PyTorch."""

import csv
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from randlora_pl.data.catalog.coop import with_split
from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.utils.errors import UserError, brief, near
from randlora_pl.utils.files.documents import is_file, parse_json
from randlora_pl.utils.image_spec import ImageSpec, read_resize
from randlora_pl.utils.machine import usable_cores


def check(values: Mapping[str, Any], row: DatasetSpec) -> None:
    """Check `ImageData`'s options by name, except prompts and task.

    Raises:
        UserError: An option is invalid; the message has the first.
    """
    for each in checks(values, row):
        each()


def checks(values: Mapping[str, Any], row: DatasetSpec) -> Iterator[Callable[[], None]]:
    """Yield each check of `check`."""
    known = {**values, "captions": row.captions, "without_classes": "captions" if row.captions else "", "row": row}
    every = (check_subset, check_split, check_run, check_balance, check_augment, check_frame, check_root)
    for each in every:
        yield partial(each, **{name: known[name] for name in signature(each).parameters})


def check_root(root: Any, row: DatasetSpec) -> None:
    """Refuse data of the user without their place."""
    if root is None and row.own:
        raise UserError(f"The dataset {row.name!r} needs --data.root: {row.source} ({row.layout})")


def check_epochs(max_epochs: int | None) -> None:
    """Refuse a number of epochs of the trainer."""
    if max_epochs != 1:
        raise UserError(
            f"trainer.max_epochs is {max_epochs}, but a run is one pass over its planned draws. "
            "Keep it at 1 and set --data.epochs or --data.steps"
        )


def check_subset(shots: int | None, fraction: float | None, captions: bool) -> None:
    """Check few-shot and fraction options; ``captions``: the dataset has no classes."""
    if shots is not None and fraction is not None:
        raise UserError(f"--data.shots {shots} and --data.fraction {fraction} exclude each other. Set only one of them")
    if shots is not None and captions:
        raise UserError("--data.shots needs classes, but captions have none. Use --data.fraction")


def is_draw(path: str | Path | None) -> bool:
    """Return True if a file of chosen images is a published draw, by its suffix."""
    return path is not None and Path(path).suffix.lower() == ".jsonl"


def check_split(
    split: str, classes: str, shots_file: str | None, fraction: float | None, captions: bool, row: DatasetSpec
) -> None:
    """Check the split, the half of the classes, and a published draw."""
    with_split(row, split)
    if classes != "all" and captions:
        raise UserError(f"--data.classes {classes} needs classes, but captions have none. Remove it")
    if fraction is not None and is_draw(shots_file):
        raise UserError(f"--data.fraction {fraction} and a published draw exclude each other. Set only one of them")


def check_trains(row: DatasetSpec, shots_file: str | None = None) -> None:
    """Refuse to train or to validate on a dataset that has test images only, and a published draw that is missing."""
    if row.trains_on:
        raise UserError(
            f"{row.title} has test images only. Train on {row.trains_on}, then run: "
            f"randlora-pl test --adapter RUN --data.dataset {row.name}"
        )
    if is_draw(shots_file) and not is_file(path := Path(str(shots_file)).expanduser()):
        raise UserError(f"The shots file {path} does not exist (--data.shots_file)")


def check_run(epochs: int | None, steps: int | None, num_workers: int | None) -> None:
    """Check the length of the run and the worker processes."""
    if epochs is not None and steps is not None:
        raise UserError(f"--data.epochs {epochs} and --data.steps {steps} exclude each other. Set only one of them")
    most = max(64, 4 * usable_cores())  # each process takes hundreds of megabytes
    if num_workers is not None and num_workers > most:
        raise UserError(f"--data.num_workers is {num_workers}, but at most {most} can help here: 4 per core, or 64")


def check_balance(balance: str | None, without_classes: str = "") -> None:
    """Check the correction for classes of different sizes; ``without_classes`` names labels that are not classes."""
    if balance is not None and without_classes:
        raise UserError(f"--data.balance {balance} needs classes, but {without_classes} have none. Remove it")


def check_augment(mixup: float | None, cutmix: float | None, captions: bool) -> None:
    """Check augmentation options; ``captions``: the dataset has no classes."""
    for name, value in (("mixup", mixup), ("cutmix", cutmix)):
        if value is not None and captions:
            raise UserError(f"--data.{name} blends class labels, but captions have none. Remove it")


def check_softmax(mixup: float | None, cutmix: float | None, task: str, blended_labels: bool) -> None:
    """Refuse blended labels in a task that does not learn class probabilities."""
    if (mixup is not None or cutmix is not None) and not blended_labels:
        name = "mixup" if mixup is not None else "cutmix"
        raise UserError(
            f"--data.{name} needs a softmax over all classes, but {task} compares an image with the "
            "captions of its batch. Remove it, or use --model LinearHeadTask or TextHeadTask"
        )


def read_templates(templates: Sequence[str] | str | None) -> list[str] | None:
    """Return prompts from the option or from a text file, one per line; a text with {} is a single prompt.

    Raises:
        UserError: The file is missing, empty or not text, or a line has no {}.
    """
    if not isinstance(templates, str):
        return None if templates is None else list(templates)
    path = Path(templates).expanduser()
    if not is_file(path):
        if templates.startswith("["):
            raise UserError(
                f"--data.templates {brief(templates)} is not a list of texts, such as ['a photo of a {{}}.']"
            )
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
        raise UserError(f"The prompt file {path} is empty. Write one prompt per line, such as: a photo of a {{}}.")
    return [line for line in lines if line]


def check_frame(
    crop_scale: Sequence[float], mean: Sequence[float] | None, std: Sequence[float] | None, resize: str
) -> None:
    """Check transforms."""
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise UserError(
            f"--data.crop_scale is {list(crop_scale)}, but must be two fractions with 0 < minimum <= maximum <= 1"
        )
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and (problem := ImageSpec.of_values({name: values}).problem()):
            raise UserError(f"--data.{name} sets {problem}")
    read_resize(resize)


def check_templates(templates: Sequence[str] | None, captions: bool) -> None:
    """Check prompts; ``captions``: the dataset has no classes."""
    if templates is not None and captions:
        raise UserError("--data.templates needs classes; captions are used unchanged")
    if templates is not None and not templates:
        raise UserError("--data.templates is empty. Set at least one, such as ['a photo of a {}.']")
    for template in templates or ():
        if template.count("{}") != 1:
            raise UserError(f"The template {template!r} must have {{}} once, where the class name goes")


log = logging.getLogger("randlora_pl")


def class_names(row: DatasetSpec, found: Sequence[str], file: str | None = None) -> list[str]:
    """Return the class names by label; captions for caption datasets.

    Args:
        row: Specification of the dataset.
        found: Class names in its files.
        file: File of names (see `read_classnames`).

    Raises:
        UserError: The file is invalid, or two classes have the same name.
    """
    own = row.classnames or found
    if row.captions:
        return list(own)
    if file is not None:
        names = read_classnames(Path(file).expanduser(), own)
    else:
        names = [name.replace("_", " ") for name in own] if row.own else list(own)
        if row.patterns and all(re.fullmatch(r"class \d+", name) for name in own):
            log.warning(
                "the shards have class numbers only: prompts such as 'a photo of a class 0.' mean nothing to "
                "CLIP. Put classnames.txt (one name per line) next to them, or set --data.classnames FILE"
            )
    name, times = Counter(names).most_common(1)[0]
    if times > 1 and (row.own or file is not None):  # ImageNet has two missiles, for example
        raise UserError(f"Two classes are both called {name!r}. Set different names with --data.classnames FILE")
    return names


def read_classnames(path: Path, classes: Sequence[str]) -> list[str]:
    """Read class names: one per line in the order of the classes, CSV ``folder,name``, or a JSON mapping.

    Args:
        path: File; its suffix selects the format.
        classes: Dataset's own names (for a folder: the sub-folders), by label.

    Returns:
        One name per class.

    Raises:
        UserError: The file is missing, names too few or too many classes, or an unknown one.
    """
    if not is_file(path):
        raise UserError(f"The class name file {path} does not exist (--data.classnames)")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            loaded = parse_json(text)
            if isinstance(loaded, list):
                return _one_each(path, [str(name) for name in loaded], classes)
            return _mapped(path, {str(key): str(name) for key, name in loaded.items()}, classes)
        if path.suffix.lower() == ".csv":
            lines = [line for line in csv.reader(text.splitlines()) if line]
            for line in lines:
                if len(line) != 2:
                    raise UserError(f"{path}: {','.join(line)!r} is not of the form folder,name")
            lines = lines[1:] if lines and lines[0] == ["folder", "name"] else lines
            return _mapped(path, {key.strip(): name.strip() for key, name in lines}, classes)
        return _one_each(path, [line.strip() for line in text.splitlines() if line.strip()], classes)
    except (OSError, ValueError, AttributeError, csv.Error) as error:
        raise UserError(f"The class name file {path} cannot be read: {error}") from error


def _one_each(path: Path, names: list[str], classes: Sequence[str]) -> list[str]:
    if len(names) != len(classes):
        raise UserError(f"{path} has {len(names)} class names, the dataset has {len(classes)} classes")
    return names


def _mapped(path: Path, names: dict[str, str], classes: Sequence[str]) -> list[str]:
    for key in names:
        if key not in classes:
            raise UserError(f"{path} names the class {key!r}, which the dataset does not have.{near(key, classes)}")
    missing = [name for name in classes if name not in names]
    if missing:
        raise UserError(f"{path} has no name for {len(missing)} of {len(classes)} classes, the first: {missing[0]!r}")
    return [names[name] for name in classes]
