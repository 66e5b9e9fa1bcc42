"""The classes that a config may name, and their options, as the classes themselves declare them.

They are imported when they are asked for, which takes the seconds of PyTorch's import.
"""

import dataclasses
import inspect
import re
import types
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import docstring_parser

from randlora_pl.language.catalog import TASKS as TEXT_TASKS
from randlora_pl.run import TIMEOUT
from randlora_pl.utils.errors import UserError, brief, near
from randlora_pl.utils.options import Positive
from randlora_pl.utils.own_classes import import_or_refuse, is_outside, is_registered, named_modules, path_by_name
from randlora_pl.utils.quick_imports import quick_imports

if TYPE_CHECKING:
    from randlora_pl.adapters import Adapter
    from randlora_pl.data.base import PlannedData
    from randlora_pl.tasks import Objective

Logger = Literal["tensorboard", "csv", "wandb", "mlflow", "none"]

_WHAT = {"model": "task", "model.adapter": "adapter", "model.adapter.inner": "adapter"}
_WHAT |= {"model.prompts": "prompt learner", "model.head": "head", "model.regulation": "regulation"}
"""Name of what each option of `CLASSES` chooses, for messages."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Name, folder, loggers and timeout of a run."""

    name: str | None = None
    """Name of the run (by default dataset, model and adapter), whose folder is ROOT/NAME/TIME."""
    root: str = "runs"
    """Folder of all runs."""
    logger: Logger | list[Logger] = "tensorboard"
    """tensorboard, csv, wandb, mlflow or none, or several as [tensorboard,csv]."""
    timeout: Annotated[float, Positive] = TIMEOUT
    """Seconds to wait for other processes before treating them as lost."""


@dataclasses.dataclass(frozen=True)
class Option:
    """Option of a class: its type with its checks, and its default or `inspect.Parameter.empty`."""

    owner: type
    name: str
    kind: Any
    default: Any

    @property
    def help(self) -> str:
        """The text below it in its class, or in the parent that declares it."""
        homes = (base for base in self.owner.__mro__ if self.name in vars(base).get("__annotations__", {}))
        return " ".join(next(filter(None, (_texts(base).get(self.name) for base in homes)), "").split())

    @property
    def sentence(self) -> str:
        """The first sentence of its help, without the stop."""
        return re.split(r"(?<=[^.\d])[.;:] ", self.help + " ")[0].rstrip(". ")

    @property
    def choices(self) -> str:
        """The type as a reader sees it: ``int | ceil`` of ``Annotated[int, Positive] | Literal['ceil']``."""
        return _written_type(self.kind)

    @property
    def written(self) -> str | None:
        """The default as Python writes it; None if the option is required."""
        return None if self.default is inspect.Parameter.empty else _written(self.default)

    @property
    def type(self) -> Any:
        """The type if its values are plain, else Any: only the parser checks the others."""
        return self.kind if is_plain(self.kind) else Any


@cache
def _texts(kind: type) -> dict[str, str]:
    return {each.arg_name: each.description or "" for each in docstring_parser.parse_from_object(kind).params}


def _written_type(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _written_type(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " | ".join(map(_written_type, inner))
    if inner:
        return f"{origin.__name__}[{', '.join(map(_written_type, inner))}]"
    return "None" if kind is types.NoneType else "..." if kind is ... else getattr(kind, "__name__", str(kind))


def _written(value: Any) -> str:
    from randlora_pl.adapters.described import Described

    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if not isinstance(value, Described):
        return repr(value)
    options = options_of(type(value)).values()
    given = [(each.name, getattr(value, each.name), each.default) for each in options]
    changed = [f"{name}={_written(own)}" for name, own, default in given if own != default]
    return f"{type(value).__name__}({', '.join(changed)})"


def is_plain(kind: Any) -> bool:
    """Return True if a type has plain values only, no object of a class."""
    if get_origin(kind) is Literal:
        return True
    kind = kind.__origin__ if get_origin(kind) is Annotated else kind
    inner = get_args(kind) or (kind,)
    plain = (str, int, float, bool, types.NoneType, list, dict, tuple, Any, ..., inspect.Parameter.empty)
    return all(map(is_plain, inner)) if inner != (kind,) else kind in plain


@cache
def options_of(kind: type) -> dict[str, Option]:
    """Return the options of a class by name."""
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    made = {each.name: each.default_factory for each in fields if each.default_factory is not dataclasses.MISSING}
    return {
        name: Option(kind, name, each.annotation, made[name]() if name in made else each.default)
        for name, each in inspect.signature(kind).parameters.items()
    }


def summary(kind: type) -> str:
    """Return the first line of a class's docstring."""
    return (kind.__doc__ or "").partition("\n")[0]


# Classes


def _room(name: str, text: bool = False) -> types.ModuleType:
    """Import a package of this program, and first the libraries that it needs."""
    with quick_imports("torchmetrics", *([] if text else ["open_clip"])):
        return import_module(f"randlora_pl.{name}")


def _exported(room: str, base: type) -> Iterator[tuple[str, type]]:
    """Yield the classes below a base that a package exports."""
    package = _room(room)
    for name in package.__all__:
        kind = getattr(package, name)
        if isinstance(kind, type) and issubclass(kind, base) and not inspect.isabstract(kind):
            yield name, kind


@cache
def classes(option: str) -> dict[str, type]:
    """Return the classes of this program that an option of `CLASSES` may name; the tasks on texts come last."""
    match option:
        case "model":
            base: type[Objective] = _room("tasks").Objective
            return dict([*_exported("tasks", base), *_exported("language", base)])
        case "model.adapter" | "model.adapter.inner":
            methods = _exported("adapters.methods", _room("adapters").Adapter)
            return dict(sorted(methods, key=lambda named: named[0].lower()))
        case "model.prompts":
            return dict(_exported("prompts", _room("prompts").PromptLearner))
    tasks = (task for _, task in _exported("tasks", _room("tasks").Objective))
    kind = next(known[name].kind for known in map(options_of, tasks) if (name := option.rpartition(".")[2]) in known)
    return {each.__name__: each for each in get_args(kind) if each is not types.NoneType}


def class_name(option: str, typed: object, key: str = "") -> str | None:
    """Return the name of the class that an option has, as the source spells it; None for a class from outside.

    Args:
        option: One of `CLASSES`.
        typed: The name that the user gave.
        key: The option that the user typed, if it is another one.

    Raises:
        UserError: The class is unknown; near names are suggested.
    """
    if re.fullmatch(r"\w+(\.\w+)+", str(typed)) and is_outside(str(typed)):
        return None
    short = str(typed).rpartition(".")[2]
    if option == "model" and own_task(short):  # without importing all the others
        return short
    spelled = {name.lower(): name for name in classes(option)}
    if short.lower() in spelled:
        return spelled[short.lower()]
    if path_by_name(short) is not None:
        return None
    what, every = _WHAT[option], ", ".join(spelled.values())
    raise UserError(f"Unknown {what} {brief(short)} (--{key or option}).{near(short, spelled.values())} Known: {every}")


def own_task(name: str) -> "type[Objective] | None":
    """Return the task of this program with a name."""
    text = name in TEXT_TASKS
    kind = getattr(_room("language" if text else "tasks", text), name, None)
    base: type[Objective] = _room("tasks", text).Objective
    return kind if isinstance(kind, type) and issubclass(kind, base) and not inspect.isabstract(kind) else None


def task_of(path: str) -> "type[Objective] | None":
    """Return the task of a config; None for another class, and for one from outside that is not imported.

    Args:
        path: Name or import path. A task from outside is imported already, or is an entry point.
    """
    if ("." not in path or not is_outside(path)) and (task := own_task(path.rpartition(".")[2])):
        return task
    path = path_by_name(path) or path
    module, _, name = path.rpartition(".")
    there = import_or_refuse(module, f"The entry point {path}") if is_registered(path) else named_modules().get(module)
    kind = getattr(there, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, _room("tasks").Objective) else None


def data_class(task: "type[Objective] | None") -> "type[PlannedData]":
    """Return the class of a task's data; without a task, the class of images."""
    package, _, name = (task or _room("tasks").Objective).data_module.rpartition(".")
    kind: type[PlannedData] = getattr(import_module(package), name)
    return kind


def rate_name(method: str, task: str | None) -> str:
    """Return the option with a method's learning rate: of a linear probe the head's, of `Frozen` the prompts'.

    Args:
        method: Name of the method; one from outside has the adapter's.
        task: Name of the task class, None for a class from outside. A text task has the adapter's for its head.
    """
    kind: type[Adapter] | None = classes("model.adapter").get(method)
    return "learning_rate" if kind is None or task in TEXT_TASKS else str(kind.rate_option)


def method_with(trait: str, value: object) -> str:
    """Return the name of the adapter class that declares this value of a trait."""
    return next(name for name, kind in classes("model.adapter").items() if vars(kind).get(trait) == value)


def options_by_group(names: dict[str, str | None], data: type) -> dict[str, dict[str, Option] | None]:
    """Return the options of a command by group, for names of classes by option of `CLASSES` and the class of the data.

    Both names and options are None for a class from outside, whose options are not checked here.
    """
    from lightning.pytorch import Trainer

    groups: dict[str, Any] = {"data": options_of(data), "run": options_of(RunOptions), "trainer": options_of(Trainer)}
    groups |= {group: options_of(kind) for group, kind in callback_classes().items()}
    for option, name in names.items():
        groups[option] = options_of(own_task(name) if option == "model" else classes(option)[name]) if name else None
    for group in ("data", "model"):  # seed_everything sets their seeds
        if groups.get(group):
            groups[group] = {name: option for name, option in groups[group].items() if name != "seed"}
    return groups


def callback_classes() -> dict[str, type]:
    """Return the callbacks whose options are a group of their own."""
    room = _room("run.callbacks")
    kinds = {"checkpoint": room.RunCheckpoint, "gradient_flow": room.GradientFlow, "spectrum": room.UpdateSpectrum}
    return kinds | {"unseen_gradient": room.UnseenGradient}


def takes_texts(task: "type[Objective] | None") -> bool:
    """Return True if a task has data of texts."""
    return data_class(task).__module__.startswith("randlora_pl.language.")
