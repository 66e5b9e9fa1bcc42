"""Mistakes of a command that are found before heavy imports: names, types, and values that exclude each other."""

import ast
import copy
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

from randlora_pl.run.options.choices import choose_dataset
from randlora_pl.run.options.classes import LISTS
from randlora_pl.run.options.compose import DEFAULTS, Command, compose, is_option
from randlora_pl.run.options.explain import check_adapters, check_option, check_value, line_numbers, spell
from randlora_pl.run.options.own_classes import task_name
from randlora_pl.run.options.validate import (
    check_form,
    class_choices,
    data_class,
    groups_of,
    is_text_task,
    known_class,
    tasks,
    verb_of,
)
from randlora_pl.utils.errors import UserError, brief, near

Mistake = tuple[str, UserError]
"""Short name of the option, such as ``model.adapter.rank``, and the error."""

LOGGERS = {"wandb": "wandb", "mlflow": "mlflow"}
"""Package of each logger that is not always installed, which is the name of its extra, too."""

_VALIDATED = {
    "ImageData": ("acc", "loss"),
    "TextData": ("acc", "loss"),
    "LabelledTexts": ("acc", "matthews", "f1", "pearson", "spearman", "combined", "score", "loss"),
}
"""Metrics that a validation logs, by the data of the task."""

_WHAT = {"model": "task", "model.adapter": "adapter", "model.adapter.inner": "adapter"}
_WHAT |= {"model.prompts": "prompt learner", "model.head": "head", "model.regulation": "regulation"}
"""Name of what each option of `CLASSES` chooses, for messages."""

MOST_PARTS = 10**6
"""Most micro-batches per optimizer step: sampled indices are counted in 64 bits."""


def check_names(command: Command) -> None:
    """Check names and values of a command, and correct the spelling of classes.

    Raises:
        UserError: The first mistake.
    """
    for _, error in mistakes(command):
        raise error


def check_here(command: Command) -> None:
    """Check what a command needs on this machine: paths and packages.

    Raises:
        UserError: Something is missing; the message has what to expect, or the command to get it.
    """
    flat = command.flat()
    check_loggers(flat.get("run.logger", "none"))
    task = task_name(str(flat["model"])) or ""
    _check_root(task, flat)
    if command.verb == "fit" and not is_text_task(task):
        from randlora_pl.data.catalog.registry import find
        from randlora_pl.data.validate import check_trains

        check_trains(find(str(flat.get("data.dataset", "digits"))), flat.get("data.shots_file"))


def mistakes(command: Command) -> Iterator[Mistake]:
    """Yield every mistake of a command; correct the spelling of classes."""
    flat = command.flat()
    names: dict[str, str | None] = {}
    for option, known_here in class_choices().items():
        if flat.get(option) is None:
            continue
        names[option] = None
        try:
            names[option] = known_class(flat[option], known_here, _WHAT[option], f"--{option}")
        except UserError as error:
            yield option, error
    task = task_name(str(flat["model"]))
    groups = groups_of(names, task)
    typed = [*command.values, *(word.lstrip("-").partition("=")[0] for word in command.typed if is_option(word))]
    empty = [key for key, value in command.config.items() if value == {}]
    for key in dict.fromkeys([*typed, *flat, *empty]):
        yield from _caught(key, partial(check_option, command, key, groups, key in typed))
    for option, name in names.items():
        spell(command, option, name)
    wrong = set()
    for key, value in flat.items():
        group, _, name = key.rpartition(".")
        known = (groups.get(group) or {}).get(name)
        try:
            if key in LISTS:
                check_adapters(command, key, value)
            elif known and key not in names:
                flat[key] = check_value(command, key, known, value)
        except UserError as error:
            wrong.add(key)
            yield key, error
    flat = {key: value for key, value in flat.items() if key not in wrong}
    yield from _caught("print_config", partial(_check_flags, command.values.get("print_config", "")))
    yield from _caught("seed_everything", partial(_check_seed, flat.get("seed_everything", 0)))
    yield from _caught("from_form", partial(check_form, flat))
    yield from _caught("trainer", partial(_check_trainer, flat))
    for found in _caught("data.dataset", partial(_check_dataset, task, flat.get("data.dataset"))):
        del flat["data.dataset"]
        yield found
    for check in _data_checks(task, flat):
        yield from _caught("data", check)
    yield from _caught("checkpoint.monitor", partial(_check_monitor, task, flat))


def _caught(key: str, check: Callable[[], None]) -> Iterator[Mistake]:
    """Yield the error of a check; one that names another option is a mistake of that."""
    try:
        check()
    except UserError as error:
        named = re.match(r"--([\w.]+)", error.what)
        yield named[1] if named else key, error


def _check_flags(typed: str) -> None:
    for flag in filter(None, typed.split(",")):
        if flag not in ("skip_default", "skip_null", "skip_unset", "comments"):
            hint = near(flag, ("skip_default",))
            raise UserError(
                f"--print_config={flag} is unknown.{hint} Use --print_config or --print_config=skip_default"
            )


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UserError(f"--seed_everything is {brief(seed)}: give a whole number from 0 to {2**32 - 1}.")


def _check_trainer(flat: dict[str, Any]) -> None:
    """Refuse numbers that Lightning accepts and fails at, or that would start thousands of processes.

    Raises:
        UserError: An option is out of range; the message names it.
    """
    parts = flat.get("trainer.accumulate_grad_batches")
    if isinstance(parts, int) and not 1 <= parts <= MOST_PARTS:
        raise UserError(
            f"--trainer.accumulate_grad_batches is {brief(parts)}: give a whole number from 1 to {MOST_PARTS:,}."
        )
    if str(flat.get("trainer.precision")) in ("64", "64-true"):
        raise UserError(
            "--trainer.precision 64 does not fit images, which are float32: leave it out, or give bf16-mixed."
        )
    if flat.get("trainer.max_epochs", 1) != 1:
        from randlora_pl.data.validate import check_epochs

        check_epochs(flat["trainer.max_epochs"])
    devices, most = flat.get("trainer.devices"), max(16, 2 * (os.cpu_count() or 1))
    if isinstance(devices, int) and devices > most:
        raise UserError(
            f"--trainer.devices is {brief(devices)}: each is a process; give at most {most} on this machine."
        )


def _check_dataset(task: str | None, typed: Any) -> None:
    """Refuse an unknown dataset.

    Raises:
        UserError: The dataset is unknown; near names are suggested.
    """
    if typed is None:
        return
    dataset = str(typed)
    if is_text_task(task):
        from randlora_pl.language.catalog import check_dataset

        check_dataset(dataset, data_class(task).name == "LabelledTexts")
        return
    from randlora_pl.data.catalog.registry import CATALOG, find
    from randlora_pl.language.catalog import DATASETS, LABELLED, TASKS

    fits = [name for name, known in zip(TASKS, (DATASETS, LABELLED), strict=True) if dataset in known]
    if dataset not in CATALOG and fits:
        raise UserError(f"The dataset {dataset!r} is of texts: it needs --model {' or '.join(fits)}.")
    find(dataset)


def _data_checks(task: str | None, flat: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """Yield the checks of data options that exclude each other."""
    from randlora_pl.data import validate as options
    from randlora_pl.data.catalog.registry import find

    source = data_class(task)
    values = {name: ast.literal_eval(option.default or "None") for name, option in source.options.items()}
    values |= {name: flat[f"data.{name}"] for name in values if f"data.{name}" in flat}
    if source.name == "ImageData":
        yield from options.checks(values, find(values["dataset"]))
        if task:
            blended = tasks()[task].constants.get("blended_labels", False)
            yield partial(options.check_softmax, values["mixup"], values["cutmix"], task, blended)
        return
    yield partial(options.check_run, **{name: values[name] for name in signature(options.check_run).parameters})
    if "balance" in values:
        scores = values["scores"] or values["dataset"] == "stsb"
        yield partial(options.check_balance, values["balance"], "scores" if scores else "")


def check_loggers(names: str | list[str]) -> None:
    """Refuse a logger whose package is not installed.

    Raises:
        UserError: The message has the command to install the package.
    """
    for name in names if isinstance(names, list) else [names]:
        if (package := LOGGERS.get(name)) and find_spec(package) is None:
            raise UserError(f"--run.logger {name} needs a package: pip install '.[{package}]' in the checkout")


def _check_monitor(task: str | None, flat: dict[str, Any]) -> None:
    """Refuse a metric that no validation logs; a callback of the user, and captions, may have others.

    Raises:
        UserError: The metric is unknown; near ones are suggested.
    """
    from randlora_pl.data.catalog.registry import CATALOG

    monitor, row = str(flat.get("checkpoint.monitor", "val/loss")), CATALOG.get(str(flat.get("data.dataset")))
    if task is None or flat.get("trainer.callbacks") or (row and row.captions):
        return
    known = [f"val/{name}" for name in _VALIDATED[data_class(task).name]]
    if monitor not in known:
        raise UserError(
            f"checkpoint.monitor is {monitor!r}, which no validation logs.{near(monitor, known)} "
            f"Metrics: {', '.join(known)}"
        )


def _check_root(task: str, flat: dict[str, Any]) -> None:
    """Refuse a path of the data that does not exist.

    Raises:
        UserError: The path is missing; the message has the files to expect.
    """
    from randlora_pl.data.catalog.registry import default_root, find, may_be_read, present
    from randlora_pl.data.locations import root_of

    typed, row = flat.get("data.root"), None if is_text_task(task) else find(str(flat.get("data.dataset", "digits")))
    root = default_root() if typed is None else root_of(str(typed))
    if row is not None and not row.own:
        if not present(row, root):
            from randlora_pl.data.readers.dispatch import missing

            raise missing(row, root, f"the package {row.package} is not installed" if row.package else "")
    elif typed is not None and not root.exists() and not (row and may_be_read(row, root)):
        layout = row.layout if row else "a file of texts, or its folder"
        raise UserError(f"The data folder {typed} does not exist; expected {layout}. Set it with --data.root PATH")


def mistakes_in(file: Path) -> list[str]:
    """Return all mistakes of a config, each with its line.

    Raises:
        UserError: The file describes several runs.
    """
    if verb := verb_of(file):
        raise UserError(f"{file} describes several runs: randlora-pl {verb} {file} --dry-run")
    try:
        command = compose("fit", ["--config", str(file)], copy.deepcopy(DEFAULTS))
        choose_dataset(command)
    except UserError as error:
        return [str(error)]
    lines, listed = line_numbers(file), []
    for key, mistake in mistakes(command):
        while key not in lines and "." in key:
            key = key.rpartition(".")[0]
        text = str(UserError(mistake.what, mistake.hint)).replace(f" in {file}.", ".")
        listed.append((lines.get(key, 1), text))
    return [f"{file}, line {line}: {text}" for line, text in sorted(listed)]
