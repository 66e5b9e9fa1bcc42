"""The config of a trial: a model's configs, then options, then what its method lays over them."""

import copy
from typing import Any

from randlora_pl.run.options.classes import INNER, LISTED, Tree, normalize, with_default_classes
from randlora_pl.run.options.compose import DEFAULTS, Command, merge, nested, read_config
from randlora_pl.run.options.mistakes import check_names
from randlora_pl.run.options.own_classes import import_classes
from randlora_pl.run.options.shipped import find_config
from randlora_pl.run.options.validate import is_text_task, tasks
from randlora_pl.sweep.description import METHOD
from randlora_pl.sweep.provenance import RATES
from randlora_pl.utils.errors import UserError

UNTRAINED = {"model": {"init_args": {"adapter": {"class_path": "FullFineTuning"}}}}
"""The adapter of a model that is only tested: it adds nothing to the layers."""
UNTRAINED_TEXT = {"model": {"init_args": {"adapter": {"class_path": "LoRA", "init_args": {"rank": 1}}}}}
"""Zero update of a language model, whose frozen weights may be in half precision."""


def trial_config(model: Tree, method: Tree, options: Tree, root: str | None, untrained: bool) -> Tree:
    """Return the config of a model with a method, with every class name checked.

    The facts of a model are its ``config`` (names of configs, or a config itself) and ``set``. A ``root`` overrides the
    folder of the datasets in the configs.

    Raises:
        UserError: A name is unknown, or the model cannot be tested without training.
    """
    data = {} if root is None else {"data": {"root": root}}
    tree = normalize(copy.deepcopy(DEFAULTS))
    layers = [*_configs(model["config"]), nested(options), nested(model.get("set", {})), *method_layers(method), data]
    for layer in layers:
        tree = merge(tree, normalize(layer))
    tree = check(tree)
    if not untrained:
        return tree
    task = tree["model"]["class_path"].rpartition(".")[2]
    if task in tasks() and tasks()[task].constants.get("trained_head"):
        raise UserError(
            "zero-shot needs a text head.", hint="Leave out zero-shot for this model: its linear head is untrained."
        )
    return check(merge(tree, UNTRAINED_TEXT if is_text_task(task) else UNTRAINED))


def is_text(tree: Tree) -> bool:
    """Return True if a cell's data are texts, by the name of its task."""
    return is_text_task(str(tree["model"]["class_path"]).rpartition(".")[2])


def check(tree: Tree) -> Tree:
    """Return the config with every class spelled right; a UserError refuses unknown names."""
    command = Command("fit", config=with_default_classes(copy.deepcopy(tree)))
    import_classes(command)
    check_names(command)
    return command.config


def _configs(given: str | list[str] | Tree) -> list[Tree]:
    if isinstance(given, dict):
        return [given]
    return [read_config(find_config(name)) for name in ([given] if isinstance(given, str) else given)]


def _as_class(value: Any) -> Any:
    """Return ``{adapter: NAME, ...}`` as ``{class_path: NAME, ...}``, with the adapters among its options."""
    if isinstance(value, list):
        return [_as_class(each) for each in value]
    if not isinstance(value, dict):
        return value
    options = {name: _as_class(each) if name in (INNER, LISTED) else each for name, each in value.items()}
    return {"class_path": options.pop("adapter")} | options if "adapter" in options else options


def method_layers(facts: Tree) -> list[Tree]:
    """Return the options of a method on top of a model's config."""
    model: Tree = {key: facts[key] for key in RATES if key in facts}
    if "task" in facts:
        model["class_path"] = facts["task"]
    adapter = _as_class({key: value for key, value in facts.items() if key == "adapter" or key not in METHOD})
    model |= {"adapter": adapter} if adapter else {}
    return [*_configs(facts.get("config") or []), {"model": model} if model else {}, nested(facts.get("set", {}))]
