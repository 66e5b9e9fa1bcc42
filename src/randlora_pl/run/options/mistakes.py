"""Mistakes in a command, one line each, with near matches: names, types, and values that cannot be combined.

jsonargparse would report the first alone, in ten lines. The classes are the only source of options and their types.
"""

import difflib
import os
import re
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from randlora_pl.data.catalog import CATALOG, default_root, find, may_be_read, present
from randlora_pl.data.locations import root_of
from randlora_pl.data.validate import check_epochs, check_softmax, check_trains, format_of, formats_of
from randlora_pl.language.catalog import DATASETS, LABELLED, TASKS, check_dataset
from randlora_pl.run.options.classes import (
    Option,
    class_name,
    classes,
    data_class,
    method_with,
    options_by_group,
    options_of,
    takes_texts,
    task_of,
)
from randlora_pl.run.options.compose import (
    CLASS_KEYS,
    CLASSES,
    DEFAULTS,
    INNER,
    LISTED,
    LISTS,
    Command,
    compose,
    flatten,
    is_option,
    normalize,
    parse_value,
    read_config,
    short_name,
)
from randlora_pl.utils.errors import UserError, brief, install, near, shorten
from randlora_pl.utils.files import parse_yaml
from randlora_pl.utils.options import OTHER_NAMES, literal_words, misfit
from randlora_pl.utils.own_classes import path_by_name

if TYPE_CHECKING:
    from randlora_pl.tasks import Objective

LOGGERS = {"wandb": "wandb", "mlflow": "mlflow"}
"""Package of each logger that is not always installed, which is the name of its extra, too."""


def choose_dataset(command: Command) -> None:
    """Put the dataset of a root into the config unless a dataset was typed; one config that has both is complete.

    Raises:
        UserError: The files of the root fit no format, or several.
    """
    flat = command.flat()
    root, named = flat.get("data.root"), command.config.get("data", {}).get("dataset")
    alone = "data.root" in command.values or command.bare_root
    if root is None or "data.dataset" in command.values or (named is not None and not alone):
        return
    kind, place = data_class(task_of(str(flat.get("model")))).__name__, root_of(str(root))
    if kind != "ImageData":
        formats = ("jsonl", "csv") if kind == "LabelledTexts" else ("jsonl",)
        own = [name for name in formats if place.suffix == f".{name}" or (place / f"train.{name}").is_file()]
        if own and kind == "TextData":
            from randlora_pl.language.chat import has_conversations

            file = place if place.is_file() else place / "train.jsonl"
            own = ["chat" if named == "chat" or has_conversations(file) else "jsonl"]
        if len(own) > 1:
            hint = "Choose: --data.dataset jsonl or --data.dataset csv"
            raise UserError(f"{place} has train.jsonl and train.csv.", hint)
        dataset = own[0] if own else named
    elif named is None:
        # the error of a missing "folder" has the layout
        dataset = format_of(place) if place.exists() or any(formats_of(place)) else "folder"
    else:  # the named one if it can be there, else the format that the files have
        row = CATALOG.get(named)
        fits = row is None or row.own or (row.layout and (present(row, place) or not any(formats_of(place))))
        dataset = named if fits else format_of(place)
    if dataset is not None:
        command.config["data"] = command.config.get("data", {}) | {"dataset": dataset}


def check_here(command: Command) -> None:
    """Check what a command needs: paths and packages of this machine, and a base model unless it prints a help page.

    Raises:
        UserError: Something is missing; the message has what to expect, or the command to get it.
    """
    flat = command.flat()
    check_loggers(flat.get("run.logger", "none"))
    task = task_of(str(flat["model"]))
    row = None if takes_texts(task) else find(str(flat.get("data.dataset", "digits")))
    typed = flat.get("data.root")
    root = default_root() if typed is None else root_of(str(typed))
    if row is not None and not row.own:
        if not present(row, root):
            from randlora_pl.data.readers import missing

            raise missing(row, root, f"the package {row.package} is not installed" if row.package else "")
    elif typed is not None and not root.exists() and not (row and may_be_read(row, root)):
        layout = row.layout if row else "a file of texts, or its folder"
        raise UserError(f"The data folder {typed} does not exist; expected {layout}. Set it with --data.root PATH")
    if command.verb == "fit" and row is not None:
        check_trains(row, flat.get("data.shots_file"))
    runs = not any(re.search(r"[-.]help(-all)?$", word) for word in command.typed)
    toy = task is not None and options_of(task)["name"].default == "tiny" and flat.get("model.name") is None
    if runs and toy:  # which is used only if it is named
        bases = "--config clip_vitb32, pe_core_vitb16 or dinov3_vitb16, or tiny_clip, a toy for images of 32 pixels"
        raise UserError(f"{command.verb} needs a base model.", f"Add {bases}. All models: randlora-pl models")


def check_loggers(names: str | list[str]) -> None:
    """Refuse a logger whose package is not installed.

    Raises:
        UserError: The message has the command to install the package.
    """
    for name in names if isinstance(names, list) else [names]:
        if (package := LOGGERS.get(name)) and find_spec(package) is None:
            raise UserError(f"--run.logger {name} needs the package {package}: {install(package)}")


Groups = dict[str, dict[str, Option] | None]  # None: a class from outside, whose options are not checked here

_KINDS = {"ImageData": "images", "TextData": "prompts and completions", "LabelledTexts": "labelled texts"}

IN_CONFIGS = {"seed_everything", "ckpt_path", "from_adapter", "from_form"}
SINGLE = {*IN_CONFIGS, "print_config", "config", "help", "h", "help-all"}

FORMS = ("beside", "absorbed")
"""Places of the LoRA that a run starts from, in the method that it trains."""

Mistake = tuple[str, UserError]
"""Short name of the option, such as ``model.adapter.rank``, and the error."""


def check_names(command: Command) -> None:
    """Check names and values of a command, and correct the spelling of classes.

    Raises:
        UserError: The first mistake.
    """
    for _, error in mistakes(command):
        raise error


def mistakes(command: Command) -> Iterator[Mistake]:
    """Yield every mistake of a command; correct the spelling of classes."""
    flat = command.flat()
    names: dict[str, str | None] = {}
    for option in (option for option in CLASSES if flat.get(option) is not None):
        names[option] = None
        try:
            names[option] = class_name(option, flat[option])
        except UserError as error:
            yield option, error
    task = task_of(names["model"] or str(flat["model"]))
    groups = options_by_group(names, data_class(task))
    typed = [*command.values, *(word.lstrip("-").partition("=")[0] for word in command.typed if is_option(word))]
    empty = [key for key, value in command.config.items() if value == {}]
    for key in dict.fromkeys([*typed, *flat, *empty]):
        yield from _caught(key, partial(_check_option, command, key, groups, key in typed))
    for option, name in names.items():
        _spell(command, option, name)
    wrong = set()
    for key, value in flat.items():
        group, _, name = key.rpartition(".")
        known = (groups.get(group) or {}).get(name)
        try:
            if key in LISTS:
                _check_adapters(command, key, value)
            elif known and key not in names:
                flat[key] = _check_value(command, key, known, value)
        except UserError as error:
            wrong.add(key)
            yield key, error
    flat = {key: value for key, value in flat.items() if key not in wrong}
    for key, what in _wrong_values(flat, command.values.get("print_config", "")):
        yield key, UserError(what)
    for mistake in _caught("data.dataset", partial(_check_dataset, task, flat.get("data.dataset"))):
        del flat["data.dataset"]
        yield mistake
    if flat.get("trainer.max_epochs", 1) != 1:
        yield from _caught("trainer", partial(check_epochs, flat["trainer.max_epochs"]))
    values = {name: flat[f"data.{name}"] for name in options_of(data_class(task)) if f"data.{name}" in flat}
    yield from _caught("data", partial(data_class(task), **values))
    if task and not takes_texts(task):
        blended = {name: values.get(name) for name in ("mixup", "cutmix")}
        check = partial(check_softmax, **blended, task=task.__name__, blended_labels=task.blended_labels)
        yield from _caught("data", check)
    yield from _caught("checkpoint.monitor", partial(_check_monitor, task, flat))


def _caught(key: str, check: Callable[[], object]) -> Iterator[Mistake]:
    """Yield the error of a check; one about another option is a mistake of that."""
    try:
        check()
    except UserError as error:
        named = re.match(r"--([\w.]+)", error.what)
        yield named[1] if named else key, error


def _wrong_values(flat: dict[str, Any], flags: str) -> Iterator[tuple[str, str]]:
    """Yield values that have their type and are wrong: Lightning fails at them, or would start thousands of processes.

    A LoRA to start from has a known place, and excludes a checkpoint.
    """
    for flag in filter(None, flags.split(",")):
        if flag not in ("skip_default", "skip_null", "skip_unset", "comments"):
            use = f"{near(flag, ('skip_default',))} Use --print_config or --print_config=skip_default"
            yield "print_config", f"--print_config={flag} is unknown.{use}"
    seed = flat.get("seed_everything", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        yield "seed_everything", f"--seed_everything is {brief(seed)}: give a whole number from 0 to {2**32 - 1}."
    form, lora = flat.get("from_form", FORMS[0]), flat.get("from_adapter")
    if form not in FORMS:
        yield "from_form", f"--from-form is {brief(form)}.{near(str(form), FORMS)} Set {' or '.join(FORMS)}."
    elif form != FORMS[0] and lora is None:  # a printed config has the default
        yield "from_form", "--from-form needs a LoRA to start from. Add --from-adapter RUN, or remove it."
    if flat.get("ckpt_path") is not None and lora is not None:
        yield "ckpt_path", "--ckpt_path continues a run, and --from-adapter starts a new one. Remove one of them."
    key, most = "trainer.accumulate_grad_batches", 10**6  # sampled indices are counted in 64 bits
    parts = flat.get(key)
    if isinstance(parts, int) and not 1 <= parts <= most:
        yield key, f"--{key} is {brief(parts)}: give a whole number from 1 to {most:,}."
    if str(flat.get("trainer.precision")) in ("64", "64-true"):
        what = "--trainer.precision 64 does not fit images, which are float32: leave it out, or give bf16-mixed."
        yield "trainer.precision", what
    devices, most = flat.get("trainer.devices"), max(16, 2 * (os.cpu_count() or 1))
    if isinstance(devices, int) and devices > most:
        what = f"--trainer.devices is {brief(devices)}: each is a process; give at most {most} on this machine."
        yield "trainer.devices", what


def _check_dataset(task: "type[Objective] | None", typed: Any) -> None:
    if typed is None:
        return
    dataset = str(typed)
    if takes_texts(task):
        check_dataset(dataset, data_class(task).__name__ == "LabelledTexts")
        return
    fits = [name for name, known in zip(TASKS, (DATASETS, LABELLED), strict=True) if dataset in known]
    if dataset not in CATALOG and fits:
        raise UserError(f"{dataset!r} is a dataset of texts: it needs --model {' or '.join(fits)}.")
    find(dataset)


def _check_monitor(task: "type[Objective] | None", flat: dict[str, Any]) -> None:
    """Refuse a metric that no validation logs; a callback of the user, and captions, may have others."""
    from randlora_pl.tasks.measures import SEVERAL  # its package imports PyTorch, as the task has done

    monitor, row = str(flat.get("checkpoint.monitor", "val/loss")), CATALOG.get(str(flat.get("data.dataset")))
    if task is None or flat.get("trainer.callbacks") or (row and row.captions):
        return
    measures = [*task.measures, *(SEVERAL if row and row.several and task.takes_several else ())]
    known = list(dict.fromkeys(f"val/{measure.name}" for measure in measures if measure.validated))
    if monitor not in known:
        raise UserError(
            f"checkpoint.monitor is {monitor!r}, which no validation logs.{near(monitor, known)} "
            f"Metrics: {', '.join(known)}"
        )


# Names


def _check_option(command: Command, key: str, groups: Groups, typed: bool) -> None:
    """Refuse an option or a key of a config that does not exist; the message has its file, and near names."""
    parts = (short_name(key) if key.startswith("model") else key.rstrip("+")).split(".")  # others have a fixed class
    if key in IN_CONFIGS or (typed and (parts[0] in SINGLE or parts[-1] == "help")):
        return
    places = [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
    group = next((place for place in places if place in groups), parts[0])
    rest = parts[group.count(".") + 1 :]
    if group in groups:
        known = groups[group]
        if not rest or known is None or rest[0] in known:
            return
    where = _file_with(command, key)
    if where and "methods" in read_config(where):
        raise UserError(f"{where} describes several runs, not one: randlora-pl sweep {shlex.quote(str(where))}")
    what = f"Unknown key {shorten(key, 80)} in {where}." if where else f"Unknown option --{shorten(key, 80)}."
    raise UserError(
        f"{what}{_suggest(group, rest or parts, groups)} All options: randlora-pl {command.verb} --help-all"
    )


def _suggest(group: str, rest: list[str], groups: Groups) -> str:
    """Return options with the same last part, else near ones of the same group, else near ones of any group.

    An option of another kind of data is marked as such.
    """
    every = {name: f"--{name}" for name in sorted(SINGLE - {"h"})}
    every |= {f"{place}.{name}": f"--{place}.{name}" for place, names in groups.items() for name in sorted(names or ())}
    if rest[-1] == "seed":
        return " Did you mean --seed_everything?"
    if rest[-1] in ("dryrun", "dry"):  # `fit` takes it out of its words before
        return " Did you mean --dry-run?"
    if rest[0] in CLASS_KEYS:
        return f" Write its options directly under {group}."
    if group == "data":
        known_data = {data.__name__: options_of(data) for data in map(data_class, classes("model").values())}
        kinds = [kind for name, kind in _KINDS.items() if rest[0] in known_data[name]]
    if group == "data" and kinds:
        same = {"cutoff": "max_length", "max_length": "cutoff"}.get(rest[0])
        here = f"; here --data.{same}" if same in (groups[group] or ()) else ""
        return f" It is one of {' and of '.join(kinds)}{here}."
    if (group, rest[0]) == ("model", "label_smoothing"):
        tasks = classes("model").items()
        fits = [name for name, task in tasks if rest[0] in options_of(task) and not takes_texts(task)]
        return f" It needs a softmax over all classes: --model {' or '.join(fits)}."
    if {INNER, LISTED} & {*(groups.get(group) or ())} and rest[0] in options_of(
        classes(group)[method_with("inside", True)]
    ):
        if INNER in (groups[group] or ()):
            return f" Did you mean --{group}.{INNER}.{rest[0]}?"
        parts = f"'[{{class_path: LoRA, {rest[0]}: ...}}, RandLoRA]'"
        return f" It belongs to one of the parts: --{group}.{LISTED} {parts}."
    if (group, rest[0]) == ("model.adapter", "match"):
        return " It chooses the size of an update. This method has none, because it trains the model's own tensors."
    known = classes(group) if group in CLASSES else {}
    if owners := [name for name, kind in known.items() if rest[0] in options_of(kind)]:
        return f" It belongs to {', '.join(owners)}: --{group} {owners[0]}."
    rest = [*rest[:-1], OTHER_NAMES.get(rest[-1], rest[-1])]
    candidates = [option for name, option in every.items() if name.rpartition(".")[2] == rest[-1]]
    if not candidates and groups.get(group):
        names = sorted(groups[group] or ())
        matches = [name for name in names if name.startswith(rest[0])]
        matches = matches or difflib.get_close_matches(rest[0], names, 2, 0.6)
        candidates = [".".join([f"--{group}", match, *rest[1:]]) for match in matches]
    if not candidates:
        by_end = {name.rpartition(".")[2]: option for name, option in every.items()}
        candidates = [by_end[match] for match in difflib.get_close_matches(rest[-1], by_end, 2, 0.6)]
    return f" Did you mean {' or '.join(candidates[:3])}?" if candidates else ""


def _spell(command: Command, option: str, name: str | None) -> None:
    """Replace a class's name, typed or from a config, by its right spelling, or by the path of a class from outside."""
    name = name or path_by_name(str(command.flat()[option]))
    if name is None:
        return
    if option in command.values:
        for place, word in enumerate(command.typed):
            if word.startswith("--") and short_name(word) == option:
                command.typed[place + 1] = name
        command.values[option] = name
    node: Any = {"init_args": command.config}
    for part in option.split("."):
        node = node.get("init_args", {}).get(part, {})
    if node:
        node["class_path"] = name


# Values


def _check_value(command: Command, key: str, option: Option, value: Any) -> Any:
    """Return the value of an option, a number in quotes as a number; refuse one that does not have the option's type.

    The value is as YAML reads it. The message has the line of a config.
    """
    typed, kind = command.values.get(key), option.type
    number = parse_value(value) if isinstance(value, str) else value
    whole = isinstance(value, float) and value.is_integer() and typed is None  # sweeps take 6.0 for 6
    value = int(value) if whole and misfit(value, kind) else value
    wrong = misfit(value, kind, key)
    if wrong is None or (typed is not None and misfit(typed, kind) is None):
        return value
    if isinstance(number, int | float) and misfit(number, kind) is None:
        return number
    if typed is not None and typed[:1] in ("[", "{"):
        try:
            parse_yaml(typed)
        except yaml.YAMLError as error:
            what = f"--{key} is not valid YAML: {getattr(error, 'problem', None) or error}."
            hint = "Put single quotes inside, in which a backslash is itself: \"['.*attn\\.(q|v)']\""
            raise UserError(what, hint * ("\\" in typed)) from None
    shown = typed if typed is not None and wrong.name == key else str(wrong.value)
    hint = near(shown, literal_words(kind), 1)
    wanted = wrong.wanted.replace("[a,b]", f"'[{shown}]'") if re.fullmatch(r"[\w./-]+", shown) else wrong.wanted
    file = None if typed is not None else _file_with(command, key)
    line = file and line_numbers(file).get(key)
    raise UserError(
        f"--{wrong.name}: expected {wanted}, not {shorten(shown, 80)}{'.' * bool(hint)}{hint}",
        where=f"{file}, line {line}" if line else str(file or ""),
    )


def _check_adapters(command: Command, key: str, nodes: Any) -> None:
    """Check a list of adapters, which is one value of a config, and correct the spelling of their classes."""
    if not (isinstance(nodes, list) and all(isinstance(node, dict) and "class_path" in node for node in nodes)):
        raise UserError(f"--{key} is {brief(nodes)}: give a list, such as '[{{class_path: LoRA, rank: 8}}, RandLoRA]'.")
    for place, node in enumerate(nodes):
        method = class_name("model.adapter", node["class_path"], key)
        if method is None:
            continue
        node["class_path"], known = method, options_of(classes("model.adapter")[method])
        for name, value in node.get("init_args", {}).items():
            if name == "targets":
                raise UserError(f"--{key}: all parts adapt the same layers. Set --model.targets instead of targets.")
            if name not in known:
                hint = near(OTHER_NAMES.get(name, name), known) or f" Its options are {', '.join(known)}."
                raise UserError(f"--{key}: {method} has no option {brief(name)}.{hint}")
            if name == LISTED:
                _check_adapters(command, f"{key}.{place}.{name}", value)
            elif name == INNER:
                node["init_args"][name] = inner = {"class_path": method_with("inside", True)} | value
                _check_adapters(command, f"{key}.{place}.{name}", [inner])
            else:
                _check_value(command, f"{key}.{place}.{name}", known[name], value)


def line_numbers(file: Path) -> dict[str, int]:
    """Return the line of every option of a config, by short names (see `flatten`)."""
    lines: dict[str, int] = {}

    def walk(prefix: str, node: Any) -> None:
        for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
            plain = name.value in ("class_path", "init_args")
            key = prefix if plain else f"{prefix}.{name.value}".strip(".")
            if name.value != "init_args":
                lines[key] = name.start_mark.line + 1
            walk(key, value)

    walk("", yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader))
    return lines


# Configs


def _file_with(command: Command, key: str) -> Path | None:
    """Return the config file that sets a key; None if it was typed."""
    if key in command.values:
        return None
    for file in map(Path, reversed(command.named)):
        tree = normalize(read_config(file))
        if key in tree or key in flatten(tree):
            return file
    return None


def mistakes_in(file: Path) -> list[str]:
    """Return all mistakes of a config of one run, each with its line.

    Raises:
        UserError: The file describes several runs.
    """
    if "methods" in read_config(file):
        raise UserError(f"{file} describes several runs: randlora-pl sweep {file} --dry-run")
    try:
        command = compose("fit", ["--config", str(file)], DEFAULTS)
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
