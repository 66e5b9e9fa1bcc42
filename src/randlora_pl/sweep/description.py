"""Description of a sweep, read from a YAML file; names of classes and options are checked by `plan.plan`."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from randlora_pl.data.catalog.registry import PAPER
from randlora_pl.run.options.validate import FORMS
from randlora_pl.sweep.planned import check_labels, planned_pairs, remarks, title, whole_numbers
from randlora_pl.sweep.provenance import RATES, checked, joined
from randlora_pl.utils.errors import UserError, near

Tree = dict[str, Any]

ZERO_SHOT = "zero-shot"
"""The method, and the budget, of an untrained model."""

_KEYS = (
    *("title", "paper", "models", "datasets", "budgets", "methods", "seeds", "set", "cases"),
    *("notes", "pairs", "baselines", "keep_adapters", "tune", "tuned"),
)
_FLAGS = {"baselines": False, "keep_adapters": True}
_MODEL = ("config", "set", "family", "paper_name")
_TUNE = ("search", "sampler", "trials", "pruner", "seeds", "datasets", "budgets", "monitor", "set")

_OF_THE_GRID = {
    "data.shots": "budgets",
    "data.fraction": "budgets",
    "data.dataset": "datasets",
    "seed_everything": "seeds",
}
"""Options that are an axis of the grid."""

METHOD = ("config", "adapter", "task", *RATES, "set", "cases", "models", "paper_name", "first")
"""Keys of a method; all others are options of its adapter."""


@dataclass(frozen=True)
class SweepConfig:
    """Content of a sweep's file.

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
        tune: Settings of a search: ``search`` (options and their values), ``sampler``, ``trials``, ``pruner``,
            ``seeds``, ``datasets``, ``budgets``, ``monitor``, ``set``.
        tuned: Provenance of the learning rates: the content of the provenance file that the file names.
        root: Folder of the datasets that was typed; None leaves it to the configs.
    """

    models: dict[str, Tree]
    methods: dict[str, Tree]
    datasets: dict[str, Tree]
    budgets: list[str]
    seeds: list[int]
    options: Tree = field(default_factory=dict)
    cases: list[Tree] = field(default_factory=list)
    title: str = ""
    paper: Tree = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pairs: list[list[str]] = field(default_factory=list)
    baselines: bool = False
    keep_adapters: bool = True
    tune: Tree = field(default_factory=dict)
    tuned: Tree = field(default_factory=dict)
    root: str | None = None

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "SweepConfig":
        """Build from the content of a YAML file.

        Raises:
            UserError: Names the key that is unknown, missing or wrong.
        """
        _known(content, _KEYS, "a sweep")
        for key in ("models", "methods", "datasets", "budgets"):
            if not content.get(key):
                raise UserError(f"{key} is missing: a sweep is the product of models, datasets, budgets and methods.")
        models = _group("models", content["models"])
        for label, facts in models.items():
            _known(facts, _MODEL, f"models.{label}")
            if not facts.get("config"):
                raise UserError(f"models.{label} has no config: name one, see: randlora-pl config list")
            _words(f"models.{label}.config", facts["config"])
            _options(f"models.{label}.set", facts.get("set", {}))
        methods = _group("methods", content["methods"])
        grid: Any = {"datasets": _datasets(content["datasets"]), "budgets": budgets(content["budgets"])}
        _check_cases("cases", content, grid)
        for label, facts in methods.items():
            _check_method(label, facts, models)
            for place, stage in ((f"methods.{label}", facts), (f"methods.{label}.first", facts.get("first", {}))):
                _check_cases(f"{place}.cases", stage, grid)
        tune = _mapping("tune", content.get("tune") or {})
        _known(tune, _TUNE, "tune")
        _options("tune.set", tune.get("set", {}))
        flags = {name: content.get(name, default) for name, default in _FLAGS.items()}
        if wrong := [name for name, flag in flags.items() if not isinstance(flag, bool)]:
            raise UserError(f"{wrong[0]} is {flags[wrong[0]]!r}: give true or false.")
        paper = content.get("paper") or {}
        return cls(
            models=models,
            methods=methods,
            datasets=grid["datasets"],
            budgets=grid["budgets"],
            seeds=whole_numbers("seeds", content.get("seeds", [0])),
            options=_options("set", content.get("set") or {}),
            cases=content.get("cases", []),
            title=title(content.get("title") or ""),
            paper=paper if isinstance(paper, dict) else {"table": paper},
            notes=remarks(content.get("notes") or []),
            pairs=planned_pairs(content.get("pairs") or [], [label for label in methods if not is_zero_shot(label)]),
            tune=tune,
            tuned=checked(content["tuned"], repr(content["tuned"])[:60]) if content.get("tuned") else {},
            **flags,
        )

    def content(self) -> Tree:
        """Return the content that `of` reads, with every label and budget written out."""
        tree = {item.name: getattr(self, item.name) for item in fields(self)}
        plain = all(facts == {"dataset": label} for label, facts in self.datasets.items())
        tree["datasets"] = list(self.datasets) if plain else self.datasets
        tree["set"] = tree.pop("options")
        tree["baselines"] = self.baselines or None
        return {key: tree[key] for key in _KEYS if tree[key] not in ("", {}, [], None)}

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
        return replace(
            self,
            models=older.models | self.models,
            methods=older.methods | self.methods,
            datasets=older.datasets | self.datasets,
            budgets=list(dict.fromkeys(older.budgets + self.budgets)),
            seeds=list(dict.fromkeys(older.seeds + self.seeds)),
            tuned=joined(older.tuned, self.tuned),
        )


def budgets(values: Any) -> list[str]:
    """Return budgets by their labels: ``4`` is ``4-shot``, ``0.5`` and ``50%`` are ``50%``; ``15k`` stays."""
    if not isinstance(values, list):
        raise UserError(f"budgets is {values!r}: expected a list such as [1, 16, 50%, 100%].")
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


def _check_method(label: str, facts: Tree, models: Iterable[str]) -> None:
    """Refuse options that no method has, and make ``models`` a list of labels."""
    where = f"methods.{label}"
    _options(f"{where}.set", facts.get("set", {}))
    if is_zero_shot(label):
        _known(facts, ("set", "models", "paper_name"), where)
    elif not (facts.get("config") or facts.get("adapter")):
        raise UserError(f"{where} has neither config nor adapter: give one, see: randlora-pl adapters")
    _words(f"{where}.config", facts.get("config") or [])
    if "first" in facts:
        _check_first(f"{where}.first", facts["first"])
    for name in RATES:
        if isinstance(rate := facts.get(name, 1.0), bool) or not isinstance(rate, int | float) or not rate > 0:
            raise UserError(f"{where}.{name} is {rate!r}: give a positive number.")
    if given := facts.get("models"):  # a label that is a number is a word, too
        facts["models"] = [str(name) for name in (given if isinstance(given, list) else [given])]
        if wrong := [name for name in facts["models"] if name not in models]:
            raise UserError(f"{where}.models has {wrong[0]!r}, which is none of the models.{near(wrong[0], models)}")


def _check_first(where: str, facts: Any) -> None:
    """Refuse a first stage that no method describes, or in a form that there is none of."""
    if str(_mapping(where, facts).get("adapter")).lower() != "lora":
        raise UserError(
            f"{where} has the adapter {facts.get('adapter')!r}: a stage starts from LoRA alone. Set adapter: LoRA."
        )
    if (form := facts.get("form", FORMS[0])) not in FORMS:
        raise UserError(f"{where}.form is {form!r}: choose {' or '.join(FORMS)}.")
    if wrong := {"first", "models", "paper_name"} & facts.keys():
        raise UserError(f"{where} has {min(wrong)}, which is of the whole method: remove it there.")
    _words(f"{where}.config", facts.get("config") or [])
    _options(f"{where}.set", facts.get("set", {}))


def _check_cases(where: str, facts: Mapping[str, Any], grid: Mapping[str, Iterable[str]]) -> None:
    """Refuse cases that no cell of the grid is, and give their budgets their labels."""
    cases = facts.get("cases", [])
    if not isinstance(cases, list):
        raise UserError(f"{where} is {cases!r}: expected a list such as [{{budgets: [1], set: {{data.epochs: 50}}}}].")
    for case in cases:
        _known(_mapping(where, case), ("set", *grid), where)
        _options(f"{where}.set", case.get("set", {}))
        if "budgets" in case:
            case["budgets"] = budgets(case["budgets"])
        for axis, values in grid.items():
            if not isinstance(chosen := case.get(axis, []), list):
                raise UserError(f"{where} has {axis} {chosen!r}: give a list, such as [{next(iter(values))}].")
            for value in chosen:
                if value not in list(values):  # a list has no hash
                    raise UserError(f"{where} has {value!r}, which is none of the {axis}.{near(str(value), values)}")


def _datasets(value: Any) -> dict[str, Tree]:
    value = list(PAPER) if value == "all" else value
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return {name: {"dataset": name} for name in value}
    if isinstance(value, dict):
        groups = _group("datasets", value)
        for label, facts in groups.items():
            _options(f"datasets.{label}", {"data": {name: facts[name] for name in facts if name != "dataset"}})
        return {label: {"dataset": label} | facts for label, facts in groups.items()}
    raise UserError(f"datasets is {value!r}: expected a list of names, all, or {{LABEL: {{dataset: NAME, ...}}}}.")


def _group(name: str, value: Any) -> dict[str, Tree]:
    check_labels(name, _mapping(name, value))
    return {str(label): dict(_mapping(f"{name}.{label}", facts or {})) for label, facts in value.items()}


def _mapping(name: str, value: Any) -> Tree:
    if not isinstance(value, dict):
        raise UserError(f"{name} is {value!r}: expected options such as {{name: value}}.")
    return value


def _words(name: str, value: Any) -> None:
    """Refuse a value that is neither a word nor a list of words."""
    if not all(isinstance(word, str) for word in (value if isinstance(value, list) else [value])):
        raise UserError(f"{name} is {value!r}: give the name of a config, or a list of names.")


def _options(name: str, value: Any) -> Tree:
    """Return options; refuse those that the grid sets itself, because one would silently override the other."""
    for path, instead in _OF_THE_GRID.items():
        part, _, option = path.partition(".")
        inner = _mapping(name, value).get(part)
        if path in value or (isinstance(inner, dict) and option in inner):
            raise UserError(f"{name} has {path}: that is what {instead} are for.")
    return _mapping(name, value)


def _known(facts: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in facts:
        if key not in known:
            raise UserError(f"{where} has no key {key!r}.{near(str(key), known)} Known: {', '.join(known)}")
