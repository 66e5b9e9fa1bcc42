"""Check of a cell's config without weights: refuse what cannot run, and count."""

from dataclasses import dataclass
from typing import Any, TypeVar

from randlora_pl.adapters import inject
from randlora_pl.adapters.methods.refine import check_layers, make_next_stage
from randlora_pl.adapters.save_load import make_adapter
from randlora_pl.data.base import PlannedData
from randlora_pl.run.options import classes
from randlora_pl.run.options.compose import INNER, LISTED
from randlora_pl.sweep import Tree
from randlora_pl.sweep.plan import Cell
from randlora_pl.tasks.objective import Objective
from randlora_pl.tasks.prompt.task import PARTS
from randlora_pl.tasks.restore import find_task
from randlora_pl.utils.errors import UserError, errors_in

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Counts:
    """Parameters that train, a head left out, and all parameters of the backbone with its adapter."""

    trainable: int
    total: int


def task_of(tree: Tree) -> Objective:
    """Return the task that a checked config describes.

    Raises:
        UserError: An option is impossible.
    """
    arguments, kind = dict(tree["model"]["init_args"]), kind_of(tree)
    described = _described(arguments.pop("adapter"))
    adapter = make_adapter(described["method"], described["options"], "model.adapter", "see randlora-pl adapters NAME")
    arguments |= {name: _described(arguments[name]) for name in PARTS if arguments.get(name) is not None}
    return _made(kind, kind.arguments(arguments, "model") | {"adapter": adapter}, "model")


def data_of(tree: Tree) -> PlannedData:
    """Return the data module that a checked config describes; nothing is read.

    Raises:
        UserError: An option is impossible.
    """
    return _made(classes.data_class(kind_of(tree)), dict(tree.get("data", {})), "data")


def kind_of(tree: Tree) -> type[Objective]:
    """Return the class of the task of a checked config.

    Raises:
        UserError: It is not a task.
    """
    name = str(tree["model"]["class_path"])
    return classes.task_of(name) or find_task(name)


def _made(kind: type[Kind], arguments: dict[str, Any], where: str) -> Kind:
    """Make an object of a class; its error is one line."""
    try:
        with errors_in(where):
            return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {kind.__name__} does not accept these options ({error}).") from error


def counts(tree: Tree) -> Counts | None:
    """Count on the meta device; None for a model of unknown shape.

    Raises:
        UserError: The adapter does not fit the model, or trains nothing.
    """
    task = task_of(tree)
    if (built := task.on_meta()) is None:
        return None
    model, targets = built
    learned, head = task.beside_on_meta(model)
    inject(model, task.adapter, targets)
    trainable = learned + sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not trainable and not classes.takes_texts(type(task)) and not head:
        raise UserError(f"{task.adapter.method()} trains nothing there; give it task: LinearHeadTask.")
    total = learned + sum(parameter.numel() for parameter in model.parameters())
    return Counts(trainable, total)


def check_first(cell: Cell) -> None:
    """Refuse a method that cannot start from the LoRA that its cell trains before.

    Raises:
        UserError: They differ in the task, the model or the layers, or the method cannot contain the LoRA.
    """
    first, task = task_of(cell.first), task_of(cell.tree)
    if type(first) is not type(task):
        raise UserError(
            f"first has the task {type(first).__name__}, the method {type(task).__name__}. Give both the same task."
        )
    options = ["name", "pretrained"]
    if task.targets is not None or classes.takes_texts(type(task)):  # an image task takes the layers of the LoRA
        options.append("targets")
    for option in options:
        here, there = (getattr(each, option) or "by default" for each in (first, task))
        if here != there:
            raise UserError(
                f"first has model.{option} {here}, the method {there}. Set the same model.{option} in set and "
                "first.set, or remove it from both."
            )
    where, before, after = "the LoRA of first", first.on_meta(), task.on_meta()
    if before is None or after is None:
        return
    (model, targets), (again, _) = before, after
    report = inject(model, first.adapter, targets)
    layers = {row.layer: row.shape for row in report.rows}
    adapter = make_next_stage(report.adapter, layers, task.adapter, cell.form, where)
    check_layers(layers, again, adapter, targets, where)
    inject(again, adapter, targets)


def _described(node: Tree) -> Tree:
    """``{class_path, init_args}`` as the method and options that `make_adapter` takes."""
    name, options = str(node["class_path"]), dict(node.get("init_args") or {})
    own = "." in name and not name.startswith("randlora_pl.")
    if INNER in options:
        options[INNER] = _described({"class_path": classes.method_with("inside", True)} | options[INNER])
    if options.get(LISTED):
        options[LISTED] = [_described(each) for each in options[LISTED]]
    return {"method": name if own else name.rpartition(".")[2], "options": options}
