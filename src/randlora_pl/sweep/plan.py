"""From a description to cells: the product, the resolved config of each and its hash.

A config is made of a model's configs, then options, then what its method lays over them.
"""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

from randlora_pl.data.catalog import CATALOG
from randlora_pl.language.catalog import OWN_TEXTS
from randlora_pl.run.options import compose
from randlora_pl.run.options.classes import method_with, takes_texts, task_of
from randlora_pl.run.options.compose import INNER, LISTED, Command, flatten, merge, nested, normalize
from randlora_pl.run.options.mistakes import FORMS, check_names
from randlora_pl.run.options.saved_config import import_classes
from randlora_pl.run.options.shipped import find_config
from randlora_pl.sweep import METHOD, RATES, ZERO_SHOT, SweepConfig, Tree, is_zero_shot
from randlora_pl.utils.errors import UserError, errors_in, near


def cell_config(model: Tree, method: Tree, options: Tree, root: str | None, untrained: bool) -> Tree:
    """Return the config of a model with a method, with every class name checked.

    The facts of a model are its ``config`` (names of configs, or a config itself) and ``set``. A ``root`` overrides the
    folder of the datasets in the configs.

    Raises:
        UserError: A name is unknown, or the model cannot be tested without training.
    """
    data = {} if root is None else {"data": {"root": root}}
    tree = normalize(copy.deepcopy(compose.DEFAULTS))
    adapter = _as_class({key: value for key, value in method.items() if key == "adapter" or key not in METHOD})
    own: Tree = {key: method[key] for key in RATES if key in method}
    own |= {"class_path": method["task"]} if "task" in method else {}
    own |= {"adapter": adapter} if adapter else {}
    layers = [*_configs(model["config"]), nested(options), nested(model.get("set", {}))]
    layers += [*_configs(method.get("config") or []), {"model": own} if own else {}, nested(method.get("set", {}))]
    for layer in [*layers, data]:
        tree = merge(tree, normalize(layer))
    tree = check(tree)
    if not untrained:
        return tree
    if (kind := task_of(tree["model"]["class_path"])) and kind.trained_head:
        raise UserError(
            "zero-shot needs a text head.", hint="Leave out zero-shot for this model: its linear head is untrained."
        )
    texts = is_text(tree)
    adapter = {"class_path": method_with("untrained", "texts" if texts else "images")}
    adapter |= {"init_args": {"rank": 1}} if texts else {}
    return check(merge(tree, {"model": {"init_args": {"adapter": adapter}}}))


def is_text(tree: Tree) -> bool:
    """Return True if a cell's data are texts."""
    return takes_texts(task_of(str(tree["model"]["class_path"])))


def check(tree: Tree) -> Tree:
    """Return the config with every class spelled right; a UserError refuses unknown names."""
    command = Command("fit", config=compose.with_default_classes(copy.deepcopy(tree)))
    import_classes(command)
    check_names(command)
    return command.config


def _configs(given: str | list[str] | Tree) -> list[Tree]:
    if isinstance(given, dict):
        return [given]
    return [compose.read_config(find_config(name)) for name in ([given] if isinstance(given, str) else given)]


def _as_class(value: Any) -> Any:
    """Return ``{adapter: NAME, ...}`` as ``{class_path: NAME, ...}``, with the adapters among its options."""
    if isinstance(value, list):
        return [_as_class(each) for each in value]
    if not isinstance(value, dict):
        return value
    options = {name: _as_class(each) if name in (INNER, LISTED) else each for name, each in value.items()}
    return {"class_path": options.pop("adapter")} | options if "adapter" in options else options


Cases = Mapping[str, list[Tree]]
"""Cases by their place in the description."""


class Labels(NamedTuple):
    """Labels of a cell."""

    model: str
    dataset: str
    budget: str
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.model}, {self.dataset}, {self.budget}, {self.method}, seed {self.seed}"


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        flat: Entries that decide the result, by short names; see `result_key`.
        facts: Values that a search of learning rates tries in the cell.
        first: Config of the LoRA that it trains before, and starts from; empty without one.
        form: Form of the start from it (`randlora_pl.adapters.refine`).
        devices: Number of devices that it runs on, each with a process.
    """

    labels: Labels
    tree: Tree
    flat: Tree
    family: str = ""
    facts: Tree = field(default_factory=dict)
    first: Tree = field(default_factory=dict)
    form: Any = FORMS[0]
    devices: int = 1

    @cached_property  # a progress line looks at every cell several times
    def hash(self) -> str:
        """Return the first 12 hex digits of the SHA-256 of `flat`, the name of its folder.

        The budget separates a test of the pretrained model from a training with the same config.
        """
        return digest(self.flat | ({"budget": ZERO_SHOT} if self.untrained else {}))

    @property
    def untrained(self) -> bool:
        """Return True if it is a test of the pretrained model."""
        return self.labels.budget == ZERO_SHOT


def plan(description: SweepConfig, tuning: Tree | None = None) -> list[Cell]:
    """Return every cell in the order in which they are run: models and datasets change least often, then seeds.

    A pretrained model has one cell for each dataset: nothing in it depends on a budget or a seed. The cells of a
    search have the options of its ``tuning`` as well.

    Raises:
        UserError: A name is unknown, with its place in the description; or two cells are one run, whose folder could
            have the name of one of them only.
    """
    cells: dict[str, Cell] = {}
    checked: set[tuple[str, str]] = set()
    for model, facts in description.models.items():
        stages = {label: _stages(description, model, label) for label in description.methods_of(model)}
        pretrained = [(description.seeds[0], ZERO_SHOT, label) for label in filter(is_zero_shot, stages)]
        trained = [label for label in stages if not is_zero_shot(label)]
        for dataset in description.datasets:
            for seed, budget, method in [*pretrained, *product(description.seeds, description.budgets, trained)]:
                data = normalize({"data": description.data(dataset, budget), "seed_everything": seed})
                tree, *first = (
                    merge(_of_cases(config, dataset, budget, cases), data) for config, cases in stages[method]
                )
                tree = merge(tree, normalize(tuning)) if tuning else tree
                with errors_in(f"models.{model} with methods.{method}"):
                    devices = _devices(tree, *first)
                form = description.methods[method].get("first", {}).get("form", FORMS[0])
                if (dataset, budget) not in checked:
                    checked.add((dataset, budget))
                    with errors_in(f"datasets.{dataset}"):
                        check(tree)
                flat = result_key(flatten(tree))
                if first:
                    before = result_key(flatten(first[0] | {"from_form": form}))
                    flat |= {f"first.{name}": value for name, value in before.items()}
                labels = Labels(model, dataset, budget, method, seed)
                family = str(facts.get("family") or "")
                cell = Cell(labels, tree, flat, family, first=first[0] if first else {}, form=form, devices=devices)
                if cell.hash in cells:
                    raise UserError(f"{cells[cell.hash].labels} and {labels} are the same run; leave out one of them.")
                cells[cell.hash] = cell
    return list(cells.values())


def _stages(description: SweepConfig, model: str, method: str) -> list[tuple[Tree, Cases]]:
    """Return the config of a method and its cases, and the same of the LoRA that it starts from, if any."""
    facts, row = description.methods[method], CATALOG.get(next(iter(description.datasets.values()))["dataset"])
    options = nested(description.options)
    if row and not row.own:  # options such as data.split are checked with it, not with the config's own
        options = merge({"data": {"dataset": row.name}}, options)
    first = {key: value for key, value in facts.get("first", {}).items() if key != "form"}
    stages: list[tuple[Tree, Cases]] = []
    for place, stage in {f"methods.{method}": facts, f"methods.{method}.first": first}.items():
        if stage or stage is facts:
            with errors_in(f"models.{model} with {place}"):
                tree = cell_config(description.models[model], stage, options, description.root, is_zero_shot(method))
            stages.append((tree, {"cases": description.cases, f"{place}.cases": stage.get("cases", [])}))
    return stages


def _of_cases(tree: Tree, dataset: str, budget: str, places: Cases) -> Tree:
    """Return the config of a method, without data, with the options of the cases that hold, by their place."""
    given = {"datasets": dataset, "budgets": budget}
    for place, cases in places.items():
        with errors_in(place):
            for case in cases:
                if all(value in case.get(axis, [value]) for axis, value in given.items()):
                    tree = check(merge(tree, normalize(nested(case.get("set", {})))))
    data = {name: value for name, value in tree.get("data", {}).items() if name not in ("shots", "fraction", "dataset")}
    return tree | {"data": data}


def _devices(*stages: Tree) -> int:
    """Return the devices of a cell; a UserError refuses other values, stages that differ, and several machines."""
    trainers = [{"devices": 1, "num_nodes": 1} | stage.get("trainer", {}) for stage in stages]
    devices = [1 if given["devices"] in ("1", "auto") else given["devices"] for given in trainers]
    nodes = max(int(given["num_nodes"]) for given in trainers)
    if type(devices[0]) is not int or devices[0] < 1 or devices.count(devices[0]) < len(devices) or nodes > 1:
        given = f"trainer.devices is {devices[-1]!r} and trainer.num_nodes {nodes}"
        raise UserError(f"{given}. A cell runs on one machine. Give one number of devices for all of it, such as 2.")
    return int(devices[0])


def result_key(flat: Mapping[str, Any]) -> Tree:
    """Return the entries that decide a cell's result: without paths and without options of the run itself.

    A dataset of the catalog is known by its name; your own images and texts are known by their place.
    """
    name = flat.get("data.dataset")
    own = CATALOG[name].own if name in CATALOG else name in OWN_TEXTS
    how = ["run", "data.num_workers", "trainer.accelerator", "config", "ckpt_path"]
    how += ["trainer.devices"] if flat.get("trainer.devices") in (1, "1", "auto") else []  # more change the batch
    how += ["trainer.enable_progress_bar", "checkpoint.every_n_steps", *([] if own else ["data.root"])]
    left_out = tuple(f"{option}." for option in how)  # they change neither what a run computes nor its hash
    kept = {key: value for key, value in flat.items() if not f"{key}.".startswith(left_out)}
    return {key: _plain(kept[key]) for key in sorted(kept)}


def digest(flat: Mapping[str, Any]) -> str:
    """12 hex digits that depend on the values alone: not on their order, nor on 1 or 1.0, nor on later options."""
    text = json.dumps(flat, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:12]


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {str(key): _plain(value[key]) for key in value}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def only(cells: Sequence[Cell], choices: Sequence[str]) -> list[Cell]:
    """Return the cells with the labels that ``key=value[,value]`` words choose.

    Raises:
        UserError: No such key, or a value that no cell has.
    """
    chosen = list(cells)
    for word in choices:
        key, equals, text = word.partition("=")
        if key not in Labels._fields or not equals:
            hint = near(key, Labels._fields)
            raise UserError(f"--only {word}: expected KEY=VALUE with one of {', '.join(Labels._fields)}.{hint}")
        values = labels_of(word, text, list(dict.fromkeys(str(getattr(cell.labels, key)) for cell in cells)))
        chosen = [cell for cell in chosen if str(getattr(cell.labels, key)) in values]
    return chosen


def labels_of(word: str, text: str, known: Sequence[str]) -> list[str]:
    """Return the labels in the text of an ``--only`` word; a UserError names one that is not known."""
    values = [text] if text in known else text.split(",")
    for value in values:
        if value not in known:
            key = word.partition("=")[0]
            raise UserError(f"--only {word}: unknown {key} {value!r}.{near(value, known)} {', '.join(known)}")
    return values


def shard(cells: Sequence[Cell], text: str | None) -> list[Cell]:
    """Return every n-th cell, beginning with the i-th, for ``i/n`` with i from 1 to n; a UserError refuses others."""
    if text is None:
        return list(cells)
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"--shard {text}: expected I/N with I from 1 to N, such as 1/4.")
    return list(cells[int(number) - 1 :: int(count)])
