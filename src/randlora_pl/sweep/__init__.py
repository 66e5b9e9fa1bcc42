"""Sweeps: the product of models, datasets, budgets, methods and seeds, one run folder a cell."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, NotRequired, TypedDict, is_typeddict

import yaml

from randlora_pl.data.catalog import PAPER
from randlora_pl.run.options.mistakes import FORMS
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.options import Check, Count, Positive, misfit

Tree = dict[str, Any]

RATES = ("learning_rate", "head_learning_rate", "prompt_learning_rate")
"""Options with a learning rate."""
RATE, HEAD, _ = RATES

LOWEST, BEST = "lowest", "best"
"""Rules by which a search chooses rates."""

FILE = "tuning.json"
"""What `tune` writes."""


class _Searched(TypedDict, total=False):
    method: Tree | None
    chosen: dict[str, Any] | None
    tried: list[Tree]


class _Provenance(TypedDict):
    methods: dict[str, _Searched]
    models: NotRequired[dict[str, Tree]]
    datasets: NotRequired[list[Any] | None]
    budgets: NotRequired[list[Any] | None]
    seeds: NotRequired[list[Any] | None]


def checked(content: Any, where: str) -> Tree:
    """Return a provenance without the metrics of single runs; a UserError refuses anything else."""
    wrong = misfit(content, _Provenance)
    chosen = [] if wrong else [entry.get("chosen") or {} for entry in content["methods"].values()]
    if wrong or any(misfit(values.get(name, 1.0), float) for values in chosen for name in RATES):
        raise UserError(f"tuned: {where} does not describe how rates were chosen. Give the {FILE} that `tune` writes.")
    for entry in content["methods"].values():
        for each in entry.get("tried", []):
            each.pop("runs", None)  # else a large search makes the sweep's file too large to be read
    return dict(content)


def rule_of(provenance: Mapping[str, Any]) -> str:
    """Describe the search as text: rates with equal texts were chosen by one rule."""
    names = ["split", "monitor", "seeds", "finalists", "sampler", "trials", "pruner"]
    names += ["models", "datasets", "budgets", "set"]
    rule = {name: provenance.get(name) for name in names} | {"rule": provenance.get("rule", BEST)}
    return json.dumps(rule, sort_keys=True)


def chosen_for(provenance: Mapping[str, Any], model: Tree, label: str, method: Tree) -> dict[str, float]:
    """Return the choice of the search for a method on a model; empty if it did not search this method or model."""
    entry = provenance.get("methods", {}).get(label, {})
    chosen: dict[str, float] = (entry.get("chosen") or {}) if provenance.get("finished") else {}
    searched = _essence(entry.get("method") or {}, chosen) == _essence(method, chosen)
    models = [_essence(facts, {}) for facts in provenance.get("models", {}).values()]
    same = True
    for name, value in chosen.items():
        own: Any = method.get("set", {}).get(name) if "." in name else method.get(name)
        numbers = isinstance(own, int | float) and isinstance(value, int | float)
        same &= math.isclose(own, value) if numbers else bool(own == value)
    return chosen if chosen and searched and same and _essence(model, {}) in models else {}


def with_values(facts: Tree, values: Mapping[str, Any]) -> Tree:
    """Return a method with the values of a candidate; an option with a dot is one of its ``set``."""
    plain = {name: value for name, value in values.items() if "." not in name}
    dotted = {name: value for name, value in values.items() if "." in name}
    return facts | plain | ({"set": facts.get("set", {}) | dotted} if dotted else {})


def shown(values: Mapping[str, Any]) -> str:
    """Return a candidate as text."""
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in values.items())  # fmt: skip


def _essence(facts: Mapping[str, Any], chosen: Mapping[str, Any]) -> Tree:
    left_out = {"paper_name", "models", "family", *RATES, *chosen}  # they do not change what is trained
    kept = {key: value for key, value in facts.items() if key not in left_out}
    if isinstance(options := kept.get("set"), dict):
        kept["set"] = {name: value for name, value in options.items() if name not in chosen}
    return {key: value for key, value in kept.items() if value != {}}


Words = str | list[str]
Label = str | int | float
Seeds = Annotated[
    list[Annotated[int, Check(lambda value: 0 <= value < 2**32, "a whole number below 2**32")]],
    Check(bool, "a list of whole numbers such as [1, 2, 3]"),
    Check(lambda values: len(set(values)) == len(values), "each number once"),
]
Rate = Annotated[float, Positive]

ZERO_SHOT = "zero-shot"
"""The method, and the budget, of a pretrained model."""


class _Model(TypedDict):
    config: Words | Tree
    set: NotRequired[Tree]
    family: NotRequired[str]
    paper_name: NotRequired[Any]


class _Case(TypedDict, total=False):
    set: Tree
    datasets: list[Any]
    budgets: list[Any]


class _Method(TypedDict, total=False):
    config: Words
    adapter: str
    task: str
    learning_rate: Rate
    head_learning_rate: Rate
    prompt_learning_rate: Rate
    set: Tree
    cases: list[_Case]
    models: Label | list[Label]
    paper_name: Any
    first: Tree


class Tune(TypedDict, total=False):
    """Settings of a search."""

    search: Tree
    sampler: Literal["climb", "grid", "tpe"]
    rule: Literal["lowest", "best"]
    trials: Count
    pruner: Literal["median", "halving"]
    seeds: Seeds
    datasets: list[Any]
    budgets: list[Any]
    monitor: Annotated[str, Check(lambda value: value.startswith("val/"), "a metric of the validation like val/loss")]
    set: Tree


METHOD = tuple(_Method.__annotations__)
"""Keys of a method; all others are options of its adapter."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Content of a sweep's file; the fields are in the order of the file.

    Attributes:
        models: By label: ``config`` (a config or several), ``set`` (options), ``family`` and ``paper_name``.
        methods: By label: ``config`` or ``adapter``, its options, ``learning_rate``, ``set``; ``models`` restricts it
            to some models. It has its own ``cases``, too. ``first`` describes a LoRA that each run trains before, and
            starts from: a method, and the ``form`` (`randlora_pl.adapters.refine`).
        datasets: By label: options of the data, ``dataset`` among them.
        budgets: ``1-shot`` ... ``50%``, ``100%``; ``15k`` where a dataset comes in several sizes.
        seeds: Each selects shots, order, augmentation, bases and initial values.
        options: Options of all cells (``set`` in the file).
        cases: List of ``set`` for some ``datasets``, some ``budgets`` or both; a method's own come last.
        title: Heading of a report.
        paper: Table or figure of the paper that the sweep repeats.
        notes: Remarks on finished runs, which the report shows below its verdict.
        pairs: Pairs of methods that were planned before the runs: a report tests no others. All without any.
        baselines: Whether plain classifiers of pixels or words are measured, too, after the last cell.
        keep_adapters: Whether finished cells keep their adapter.
        tune: Settings of a search: ``search`` (options and their values), ``sampler``, ``rule``, ``trials``,
            ``pruner``, ``seeds``, ``datasets``, ``budgets``, ``monitor``, ``set``.
        tuned: Provenance of the learning rates: the content of the provenance file of the sweep.
        root: Folder of the datasets that was typed; None leaves it to the configs.
    """

    title: str = ""
    paper: Tree = field(default_factory=dict)
    models: dict[str, Tree]
    datasets: dict[str, Tree]
    budgets: list[str]
    methods: dict[str, Tree]
    seeds: Seeds
    options: Tree = field(default_factory=dict)
    cases: list[Tree] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pairs: list[list[str]] = field(default_factory=list)
    baselines: bool = False
    keep_adapters: bool = True
    tune: Tree = field(default_factory=dict)
    tuned: Tree = field(default_factory=dict)
    root: str | None = None

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> "SweepConfig":
        """Build from the content of a YAML file.

        Raises:
            UserError: Names the key that is unknown, missing or wrong.
        """
        given = {key: value for key, value in content.items() if value is not None}
        kinds: Tree = {"set" if item.name == "options" else item.name: item.type for item in fields(cls)}
        kinds |= {"cases": list[_Case], "pairs": list[tuple[str, str]], "tune": Tune}
        refuse_unknown(given, [key for key in kinds if key != "root"], "a sweep")
        for key, value in given.items():
            if key not in ("models", "methods", "datasets", "budgets", "paper", "tuned"):  # these have short forms
                fit(value, kinds[key], key)
        for key in ("models", "methods", "datasets", "budgets"):
            if not given.get(key):
                raise UserError(f"{key} is missing: a sweep is the product of models, datasets, budgets and methods.")
        models, methods = (_group(name, given[name]) for name in ("models", "methods"))
        for label, facts in models.items():
            fit(facts, _Model, f"models.{label}")
        grid: Any = {"datasets": _datasets(given["datasets"]), "budgets": budgets(given["budgets"])}
        _check_cases("cases", given, grid)
        for label, facts in methods.items():
            _check_method(label, facts, models)
            for place, stage in ((f"methods.{label}", facts), (f"methods.{label}.first", facts.get("first", {}))):
                _check_cases(f"{place}.cases", stage, grid)
        given |= {"tune": given.get("tune", {}), "options": without_axes("set", given.pop("set", {}))}
        trained = [label for label in methods if not is_zero_shot(label)]
        for pair in given.get("pairs", []):
            members("pairs", pair, trained, "trained methods")
            if pair[0] == pair[1]:
                raise UserError(f"pairs has {pair[0]!r} with itself: name two methods.")
        if not isinstance(paper := given.get("paper", {}), dict):
            given["paper"] = {"table": paper}
        if "tuned" in given:
            checked(given["tuned"], repr(given["tuned"])[:60])
        return cls(**{"seeds": [0]} | given | {"models": models, "methods": methods} | grid)

    def content(self) -> Tree:
        """Return the content that `from_content` reads, with every label and budget written out."""
        tree = {"set" if item.name == "options" else item.name: getattr(self, item.name) for item in fields(self)}
        plain = all(facts == {"dataset": label} for label, facts in self.datasets.items())
        tree |= {"datasets": list(self.datasets) if plain else self.datasets, "baselines": self.baselines or None}
        del tree["root"]
        return {key: value for key, value in tree.items() if value not in ("", {}, [], None)}

    def text(self) -> str:
        """Return the content as YAML."""
        return yaml.safe_dump(self.content(), sort_keys=False, allow_unicode=True, width=120)

    def methods_of(self, model: str) -> list[str]:
        """Return the methods that a model is tried with."""
        return [label for label, facts in self.methods.items() if model in (facts.get("models") or [model])]

    def data(self, dataset: str, budget: str) -> Tree:
        """Return the options of the data of a cell; what they do not name must be left out.

        A size is the end of the dataset's name: ``commonsense`` at ``15k`` is ``commonsense_15k``. The pretrained model
        takes the first size, since it reads the tests alone.
        """
        options = self.datasets[dataset]
        sizes = [label for label in self.budgets if label.endswith("k")]
        size = budget if budget in sizes else next(iter(sizes), "") if budget == ZERO_SHOT else ""
        return options | ({"dataset": f"{options['dataset']}_{size}"} if size else budget_options(budget))

    def union(self, older: "SweepConfig") -> "SweepConfig":
        """Return the older grid with what is new here; what both name is as here."""
        tuned = self.tuned or older.tuned
        if self.tuned and older.tuned and rule_of(self.tuned) == rule_of(older.tuned):  # of one search
            tuned = self.tuned | {"methods": older.tuned["methods"] | self.tuned["methods"]}
        return replace(
            self,
            models=older.models | self.models,
            methods=older.methods | self.methods,
            datasets=older.datasets | self.datasets,
            budgets=list(dict.fromkeys(older.budgets + self.budgets)),
            seeds=list(dict.fromkeys(older.seeds + self.seeds)),
            tuned=tuned,
        )


def budgets(values: Any) -> list[str]:
    """Return budgets by their labels: ``4`` is ``4-shot``, ``0.5`` and ``50%`` are ``50%``; ``15k`` stays."""
    fit(values, list[Any], "budgets")
    return list(dict.fromkeys(budget(value) for value in values))


def budget(value: Any) -> str:
    """Return the label of one budget; a UserError refuses all but shots, a percentage of the samples and a size."""
    text = f"{100 * value:g}%" if isinstance(value, float) else str(value).strip()
    shots = re.fullmatch(r"(\d+)(-shot)?", text)
    percent = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text)
    if shots and int(shots[1]) > 0 and not isinstance(value, bool):
        return f"{int(shots[1])}-shot"
    if re.fullmatch(r"[1-9]\d*k", text):
        return text
    if percent and 0 < float(percent[1]) <= 100:
        return f"{float(percent[1]):g}%"
    raise UserError(
        f"budgets has {value!r}: give shots of each class (16), a percentage of the samples (50%), or the "
        "size of a dataset that comes in several (15k)."
    )


def budget_options(label: str) -> Tree:
    """Return the options of the data that a budget stands for; what it does not name must be left out."""
    if label.endswith("%"):
        fraction = float(label[:-1]) / 100
        return {} if fraction == 1 else {"fraction": fraction}
    return {} if label == ZERO_SHOT else {"shots": int(label.removesuffix("-shot"))}


def is_zero_shot(label: str) -> bool:
    """Return True if a method's label stands for the pretrained model."""
    return "".join(filter(str.isalpha, label.lower())) in ("zeroshot", "untrained")


def fit(value: Any, kind: Any, where: str) -> None:
    """Refuse a value that does not have its type, has a key that its type lacks, or sets an axis of the grid.

    Raises:
        UserError: The type or a key is wrong; ``where`` names the value in the message.
    """
    if wrong := misfit(value, kind, where):
        raise UserError(f"{wrong}{f': give {wrong.wanted}' if wrong.wanted else ''}.")
    if is_typeddict(kind):
        if kind is not _Method:  # whose other keys are options of its adapter
            refuse_unknown(value, kind.__annotations__, where)
        without_axes(f"{where}.set", value.get("set", {}))


def refuse_unknown(value: Tree, known: Iterable[str], where: str) -> None:
    """Refuse keys that are not known."""
    for key in value:
        if key not in known:
            raise UserError(f"{where} has no key {key!r}.{near(str(key), known)} Known: {', '.join(known)}")


def members(where: str, values: Iterable[Any], known: Iterable[str], what: str) -> None:
    """Refuse values that are none of those that are known."""
    known = list(known)
    for value in values:
        if value not in known:
            raise UserError(f"{where} has {value!r}, which is not one of the {what}.{near(str(value), known)}")


def _check_method(label: str, facts: Tree, models: Iterable[str]) -> None:
    """Refuse options that no method has, and make ``models`` a list of labels."""
    where = f"methods.{label}"
    fit(facts, _Method, where)
    if is_zero_shot(label):
        refuse_unknown(facts, ("set", "models", "paper_name"), where)
    elif not (facts.get("config") or facts.get("adapter")):
        raise UserError(f"{where} has neither config nor adapter: give one, see: randlora-pl adapters")
    if (first := facts.get("first")) is not None:
        fit(first, _Method, f"{where}.first")
        if str(first.get("adapter")).lower() != "lora":
            raise UserError(f"{where}.first has the adapter {first.get('adapter')!r}: a stage needs a LoRA to start.")
        fit(first.get("form", FORMS[0]), Literal[FORMS], f"{where}.first.form")
        if wrong := {"first", "models", "paper_name"} & first.keys():
            raise UserError(f"{where}.first has {min(wrong)}, which belongs to the whole method: remove it there.")
    if given := facts.get("models"):  # a label that is a number is a word, too
        facts["models"] = [str(name) for name in (given if isinstance(given, list) else [given])]
        members(f"{where}.models", facts["models"], models, "models")


def _check_cases(where: str, facts: Mapping[str, Any], grid: Mapping[str, Iterable[str]]) -> None:
    """Refuse cases that no cell of the grid is, and give their budgets their labels."""
    for case in facts.get("cases", []):
        fit(case, _Case, where)
        if "budgets" in case:
            case["budgets"] = budgets(case["budgets"])
        for axis, values in grid.items():
            members(where, case.get(axis, []), values, axis)


def _datasets(value: Any) -> dict[str, Tree]:
    value = list(PAPER) if value == "all" else value
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return {name: {"dataset": name} for name in value}
    if isinstance(value, dict):
        groups = _group("datasets", value)
        for label, facts in groups.items():
            without_axes(f"datasets.{label}", {"data": {name: facts[name] for name in facts if name != "dataset"}})
        return {label: {"dataset": label} | facts for label, facts in groups.items()}
    raise UserError(f"datasets is {value!r}: expected a list of names, all, or {{LABEL: {{dataset: NAME, ...}}}}.")


def _group(name: str, value: Tree) -> dict[str, Tree]:
    """Return facts by label; refuse labels that no table can show, or that look like a path."""
    fit(value, dict[str, Any], name)
    for label in map(str, value):
        if not label.strip() or not label.isprintable() or label.startswith((".", "/", "~")) or ".." in label:
            raise UserError(f"{name} has the name {label!r}: give one of visible letters that is not a path.")
    for label, facts in value.items():
        fit(facts or {}, Tree, f"{name}.{label}")
    return {str(label): dict(facts or {}) for label, facts in value.items()}


def without_axes(name: str, value: Tree) -> Tree:
    """Return options; refuse the axes of the grid, because one would silently override the other."""
    axes = {"data.shots": "budgets", "data.fraction": "budgets", "data.dataset": "datasets", "seed_everything": "seeds"}
    for path, instead in axes.items():
        part, _, option = path.partition(".")
        inner = value.get(part)
        if path in value or (isinstance(inner, dict) and option in inner):
            raise UserError(f"{name} has {path}: that is what {instead} are for.")
    return value
