"""Saved configs: a run's (resolved), the model's in an adapter file, and the data's next to it.

These files may come from anywhere, and none is run as code.

A config of the user (``--config``) can name any class with any arguments, so that loading it can run code. An adapter
has names of this program's own classes or of classes that the user has imported, and plain values.
"""

import hashlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError, safe_open

from randlora_pl.run.options.classes import classes, is_plain, own_task
from randlora_pl.run.options.compose import (
    CLASS_KEYS,
    CLASSES,
    LISTS,
    Command,
    Tree,
    flatten,
    normalize,
    parse_value,
    read_config,
)
from randlora_pl.utils.adapter_schema import check_adapter_schema, check_format
from randlora_pl.utils.errors import UserError, brief, errors_in, near
from randlora_pl.utils.files import parse_json, write_bytes, write_text
from randlora_pl.utils.own_classes import import_named, is_importable, is_own, is_registered, named_modules
from randlora_pl.utils.run_files import ADAPTER, BEST, CONFIG, runs_in
from randlora_pl.utils.weights_files import base_arguments

if TYPE_CHECKING:
    from randlora_pl.adapters import Adapter


def import_classes(command: Command) -> None:
    """Import the modules of classes from outside that a command or its configs name.

    Args:
        command: The typed options and the configs that the user named, without any config of a run or adapter.

    Raises:
        UserError: A module does not exist, or its code fails.
    """
    paths = list(_paths_in(command.config))
    for name, text in command.values.items():
        if name.startswith(("trainer.", "model")):
            paths += _paths(name, parse_value(text), name.startswith("trainer.") or name in (*CLASSES, *LISTS))
    for option, path in paths:
        module = path.rpartition(".")[0]
        if re.fullmatch(r"\w+(\.\w+)+", path) and module not in named_modules() and not is_registered(path):
            import_named(module, f"--{option} {path}")  # other texts are not names


def check_run_config(file: Path) -> Path:
    """Return the config of a run or adapter; refuse classes from outside that the user has not imported.

    Raises:
        UserError: It names one; the message has the option that imports it.
    """
    for option, path in _paths_in(normalize(read_config(file))):
        module = path.rpartition(".")[0]
        if module not in named_modules() and not is_registered(path):
            raise UserError(
                f"{file}: {option} is {path}, which is not part of this program, and a run imports nothing by itself.",
                f"Add --import {module} if you trust it.",
            )
    return file


def _paths_in(tree: Tree) -> Iterator[tuple[str, str]]:
    """Yield the option and the import path of each class or function from outside in a config."""
    for name, value in tree.items():
        yield from _paths(name, value, name == "trainer" or "." in name)


def _paths(option: str, value: Any, any_text: bool) -> Iterator[tuple[str, str]]:
    """Yield the paths at ``class_path`` in a value, and with ``any_text`` each text that could be imported.

    Any text may be a class in the options of a class from outside, and below a dotted key, which may end at any option.
    """
    if isinstance(value, str):
        read = parse_value(value) if re.search(r"[\[{:]", value) else None
        if isinstance(read, dict | list):
            yield from _paths(option, read, any_text)
        elif any_text and _outside(value) and is_importable(value.partition(".")[0]):
            yield option, value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _paths(option, each, any_text)
    elif isinstance(value, dict):
        any_text = any_text or _outside(value.get("class_path"))
        for key, each in value.items():
            short = str(key).rpartition(".")[2]
            if short == "class_path":
                if _outside(each):
                    yield option, each
            else:
                place = option if short == "init_args" else f"{option}.{key}"
                yield from _paths(place, each, any_text or "." in str(key))


def _outside(path: Any) -> bool:
    """Return True if a value is the import path of a class that neither this program nor Lightning has."""
    return isinstance(path, str) and "." in path and path.partition(".")[0] not in ("randlora_pl", "lightning")


def _check_own_options(kind: type, options: Mapping[str, Any], file: Path) -> None:
    """Refuse a text from a file for an option that is a class or a function, which the parser would import."""
    for name, option in inspect.signature(kind).parameters.items():
        if not is_plain(option.annotation) and any("." in text for text in _texts(options.get(name))):
            raise UserError(f"{file}: {name} is {brief(options[name])}, which no saved file has: it was changed.")


def _check_methods(adapter: "Adapter", file: Path) -> None:
    """Check the options of each method from outside, itself or inside another one."""
    nested = adapter.nested_options()
    if is_own(type(adapter)):
        options = {name: value for name, value in adapter.options().items() if name not in nested}
        _check_own_options(type(adapter), options, file)
    for each in adapter.nested():
        _check_methods(each, file)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for each in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        yield from _texts(each)


def check_adapter(folder: Path) -> Path:
    """Return the file that describes an adapter; refuse what can be refused before PyTorch is imported.

    Raises:
        UserError: The file is missing, or PEFT wrote the folder.
    """
    file = folder if folder.is_file() else folder / "adapter_config.json"
    if not folder.exists():
        raise UserError(f"There is no adapter folder or file {folder}. A run keeps its adapter in RUN/adapter.")
    if not file.is_file():
        inside = [name for name in (ADAPTER, BEST) if (folder / name).is_dir()]
        hint = f" Did you mean {folder / inside[0]}?" if inside else " A run keeps it in RUN/adapter."
        raise UserError(f"{folder} is not an adapter folder: it has no {file.name}.{hint}")
    if (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{folder} is an adapter of PEFT.",
            f"Import it: randlora-pl adapter import {folder} --from peft --model NAME --pretrained TAG --output DIR",
        )
    return file


def adapter_config(folder: Path) -> Tree:
    """Return the model part of a config, image preprocessing and typed prompts from an adapter that a task has written.

    Its classes are looked up among this program's, before anything is imported.

    Raises:
        UserError: The folder is not an adapter folder, or names a class of another program.
    """
    file = check_adapter(folder)
    try:
        if file == folder:
            with safe_open(file, "numpy") as stream:
                content = parse_json(stream.metadata()["adapter_config"])
        else:
            content = parse_json(file.read_bytes())
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}. Copy it again, or choose another adapter.") from error
    except (KeyError, TypeError):
        raise UserError(f"{file} is not an adapter file: its metadata has no description.") from None
    try:
        check_format(content, folder)
        metadata = content["metadata"]
        task, arguments = metadata.get("task_class", metadata["task"]), metadata["arguments"]
        check_adapter_schema(content, file)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} has no task with its arguments: no run saved it. In Python, load_adapter(model, path) loads it."
        ) from error
    from randlora_pl.adapters.save_load import make_adapter

    _check_no_class([content["options"], arguments], file)
    adapter = make_adapter(content["method"], content["options"], file)
    _check_methods(adapter, file)
    if "task_class" not in metadata:
        kind = own_task(task)  # quick: it leaves heavy libraries out
    else:
        from randlora_pl.tasks.restore import find_task

        with errors_in(file):
            kind = find_task(task)
        _check_own_options(kind, arguments, file)
    if kind is None:
        known = classes("model")
        raise UserError(
            f"{file}: this program has no task {task!r}.{near(task, known)} Known: {', '.join(known)}. It was "
            "written by another version, is damaged, or was changed."
        )
    arguments = {name: plain(value) for name, value in kind.arguments(arguments, file).items() if name != "seed"}
    arguments |= base_arguments(content.get("base_model", {}), folder)
    frame = metadata.get("training", {}).get("frame", {})
    data = {"background": frame["background"]} if "background" in frame else {}
    data |= {"templates": metadata["templates"]} if metadata.get("typed_templates") else {}
    if frame:  # as `read_resize` reads it
        resize, crop_pct = frame["resize"], frame["crop_pct"]
        data["resize"] = resize if crop_pct == 1 else f"{resize}:{crop_pct!r}"
    model = {"class_path": task, "init_args": arguments | {"adapter": plain(adapter)}}
    return {"model": model} | ({"data": data} if data else {})


def _check_no_class(value: Any, file: Path) -> None:
    """Refuse class names, also in dotted keys and in texts that the parser of options would read as YAML."""
    if isinstance(value, str):
        read = parse_value(value)
        value = read if isinstance(read, dict | list) else ()
    if isinstance(value, dict) and CLASS_KEYS & {part for key in value for part in str(key).split(".")}:
        raise UserError(f"{file} names a class among its options, which an adapter never does: it was changed.")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_no_class(part, file)


def config_beside(adapter: Path) -> Path | None:
    """Return the config of the run that an adapter folder or file is in; None if there is none."""
    file = adapter.resolve().parent / CONFIG
    return file if file.is_file() else None


def data_beside(file: Path) -> Tree:
    """Return the data options of a config and its seed, which selects the images; all other parts are left out.

    Args:
        file: The config, see `config_beside`.

    Raises:
        UserError: The file is not a config, or a data option is anything but a plain value or a list of such.
    """
    tree, single = read_config(file), str | int | float
    data = tree.get("data")
    wrong = [] if isinstance(data, dict | None) else ["data"]
    for name, value in data.items() if isinstance(data, dict) else ():
        known = isinstance(name, str) and name.isidentifier() and name not in CLASS_KEYS
        parts = value if isinstance(value, list) else [] if value is None else [value]
        if not (known and all(isinstance(part, single) for part in parts)):
            wrong.append(f"data.{name}")
    if wrong:
        raise UserError(
            f"{file}: {wrong[0]} is not a plain value. Next to an adapter only plain data options are read; if you "
            f"trust all of the file, pass it: --config {file}"
        )
    config: Tree = {"data": data} if data else {}
    seed = tree.get("seed_everything")
    return config | ({"seed_everything": seed} if isinstance(seed, single) else {})


_CHECKSUM = "# SHA-256 of the lines below: "

_FIXED = (
    "model", "model.name", "model.pretrained", "model.img_size", "model.targets", "data.dataset",
    "data.split", "data.classes", "model.tokenizer", "model.config_overrides",
)  # fmt: skip


def plain(value: Any) -> Any:
    """Return a value as YAML: adapters as class and options, tuples as lists."""
    if hasattr(value, "describe") and hasattr(value, "method"):
        options = {name: plain(getattr(value, name)) for name in value.options()}
        return {"class_path": public_path(type(value))} | ({"init_args": options} if options else {})
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def public_path(kind: type) -> str:
    """Return the shortest path that exports a class: modules move, and configs stay."""
    parts, name = kind.__module__.split("."), kind.__qualname__
    places = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    exporting = (place for place in places if getattr(sys.modules[place], name, None) is kind)
    return f"{next(exporting, kind.__module__)}.{name}"


def resolved_config(tree: Tree, model: dict[str, Any], data: dict[str, Any]) -> Tree:
    """Return a parsed config with derived values filled in, usable as ``--config`` again.

    Args:
        tree: The parsed config as plain values.
        model: Constructor arguments of the task that were derived.
        data: Derived constructor arguments of the data module.
    """
    tree = normalize(tree)
    options = dict(tree["model"]["init_args"]) | {name: plain(value) for name, value in model.items()}
    options.pop("seed", None)  # seed_everything sets it
    tree["model"] = tree["model"] | {"init_args": options}
    tree["data"] = {key: value for key, value in (tree["data"] | data).items() if key != "seed"}
    left_out = {"config"}
    for start in ("ckpt_path", "from_adapter"):
        if tree.get(start):  # a run that is killed early starts from it again, in any working directory
            tree[start] = str(Path(tree[start]).resolve())
        else:
            left_out |= {start, *(["from_form"] if start == "from_adapter" else [])}
    return {key: value for key, value in tree.items() if key not in left_out}


def without_seed(adapter: "Adapter", given: Mapping[str, Any] | None) -> "Adapter":
    """Return a copy of an adapter whose seed is left to the run, unless it was given.

    Args:
        adapter: The adapter; DoRA's inner method is used instead of DoRA.
        given: Its part of the parsed config.
    """
    options = (given or {}).get("init_args") or {}
    inner = getattr(adapter, "inner", None)
    if inner is not None:
        return adapter.replace(inner=without_seed(inner, options.get("inner")))
    return adapter if adapter.trains_base or options.get("seed") is not None else adapter.replace(seed=None)


def write_resolved(file: Path, tree: Tree, created: bool) -> None:
    """Write the resolved config of a run; it can be used again as ``--config``.

    Args:
        file: The config in the run folder.
        tree: The resolved config.
        created: True if the run is new; of a resumed one an older, different config is kept next to it.
    """
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    if not created and file.is_file():
        if without_head(file.read_text(encoding="utf-8")) == text:
            return
        keep_older(file)
    head = f"# The resolved config of this run; use it again with: randlora-pl fit --config {file}\n"
    write_text(file, f"{head}{_CHECKSUM}{_checksum(text)}\n{text}")


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def without_head(text: str) -> str:
    """Return a config without the lines of comments above it."""
    lines = text.split("\n")
    while lines and lines[0].startswith("#"):
        del lines[0]
    return "\n".join(lines)


def keep_older(file: Path) -> None:
    """Copy a file that is about to be written again to the first free ``NAME.1``, ``NAME.2`` ..."""
    for number in range(1, 1000):
        older = file.with_name(f"{file.name}.{number}")
        if not older.exists():
            write_bytes(older, file.read_bytes())
            return


def check_run(folder: Path) -> Path:
    """Return the config of a run folder.

    Raises:
        UserError: The folder is not a run folder, or its config was changed.
    """
    if not (folder / CONFIG).is_file():
        runs = [run for name in sorted(folder.glob("*/")) for run in runs_in(name)]
        hint = f" A run in it: {runs[-1]}" if runs else " A run folder is ROOT/NAME/TIME, see runs/."
        raise UserError(f"{folder} is not a run folder: it has no {CONFIG}.{hint}")
    file = folder / CONFIG
    text = file.read_text(encoding="utf-8", errors="replace")
    sums = [line.removeprefix(_CHECKSUM) for line in text.split("\n") if line.startswith(_CHECKSUM)]
    if sums and sums[0] != _checksum(without_head(text)):
        raise UserError(
            f"{file} is cut off or damaged, or was edited: copy it again, or delete the line with its checksum to use "
            "it unchanged. To change an option, add it after --resume."
        )
    return file


def _architecture(flat: dict[str, Any]) -> dict[str, Any]:
    """Return the options that a checkpoint depends on: task, base model, targets, dataset, and all adapter options."""
    fixed = {key: flat[key] for key in _FIXED if key in flat}
    parts = ("model.adapter", "model.prompts", "model.head")
    fixed |= {key: value for key, value in flat.items() if f"{key}.".startswith(tuple(f"{part}." for part in parts))}
    return {key: str(value).rpartition(".")[2] if key in CLASSES else value for key, value in fixed.items()}


def check_architecture(command: Command, saved: Tree, source: Path) -> None:
    """Refuse to use saved weights for something else.

    Args:
        command: The command; its config is the saved one with the typed options on top.
        saved: The config that the weights were trained with.
        source: Path of the weights.

    Raises:
        UserError: An option that the weights depend on differs; the message has both values.
    """
    theirs, ours = _architecture(flatten(normalize(saved))), _architecture(command.flat())
    clashes = [
        f"--{key} is {ours[key]}, in the run {theirs[key]}"
        for key in ours
        if key in theirs and ours[key] != theirs[key] and str(ours[key]).lower() != str(theirs[key]).lower()
    ]
    if clashes:
        raise UserError(
            f"{source} was trained with another model: {'; '.join(clashes[:3])}. Remove the option, or start a new run."
        )
