"""What a comparison of methods consists of, read from a YAML file and checked before anything runs."""

import inspect
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from randlora_pl.adapters import inject
from randlora_pl.adapters.io.save_load import make_adapter
from randlora_pl.data import ImageData
from randlora_pl.experiments.sweep.provenance import chosen_for, read_provenance
from randlora_pl.models import ImageTower, library_of, meta_clip, meta_vit
from randlora_pl.tasks import ImageTask, LinearHeadTask, VisionLanguageTask
from randlora_pl.tasks.restore import TASKS
from randlora_pl.utils.errors import UserError, errors_in, near

EXPLAINED = "see randlora-pl adapters NAME"
"""How to mend an option of an adapter in a config."""


@dataclass
class Comparison:
    """What to compare, as a YAML file says it.

    Attributes:
        model: Arguments of every task, such as ``name`` and ``pretrained``.
        data: Arguments of `ImageData`, such as ``dataset`` and ``shots``.
        methods: By the name in the table: ``task``, ``method``, ``options`` of the adapter, and further
            arguments of the task, such as ``learning_rate``.
        seeds: Each seed selects shots, order, augmentation, bases and initial values.
        learning_rates: What `tune` tries for every method.
        tuning_seeds: Seeds of `tune`, none of them in ``seeds``.
        tuned: What `tune` wrote, from the file that the YAML file names; empty where nothing is said.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    learning_rates: list[float] = field(default_factory=list)
    tuning_seeds: list[int] = field(default_factory=lambda: [0, 4, 5])
    tuned: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        mappings = {"model": self.model, "data": self.data, "methods": self.methods}
        mappings |= {f"methods.{name}": facts for name, facts in dict(self.methods or {}).items()}
        for name, value in mappings.items():
            if not isinstance(value, dict) or (name == "methods" and not value):
                raise UserError(f"{name} is {value!r}: expected options such as {{name: value}}.")
        numbers: dict[str, list[Any]] = {
            "seeds": self.seeds,
            "tuning_seeds": self.tuning_seeds,
            "learning_rates": self.learning_rates,
        }
        for name, values in numbers.items():
            kinds = int | float if name == "learning_rates" else int
            wrong = not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, kinds) for v in values)
            if wrong or any(value < 0 for value in values):
                raise UserError(f"{name} is {values!r}: expected a list of positive numbers.")
        self.seeds = list(dict.fromkeys(self.seeds))
        if not self.seeds or not self.tuning_seeds:
            raise UserError(f"{'tuning_' if self.seeds else ''}seeds is empty: give one or more.")

    @classmethod
    def of(cls, content: dict[str, Any], path: Path) -> "Comparison":
        """From the content of a YAML file.

        Args:
            content: What the file says.
            path: The file, for messages.

        Raises:
            UserError: If it says something unknown.
        """
        names = [field.name for field in fields(cls)]
        for key in content:
            if key not in names:
                raise UserError(
                    f"{path} describes no comparison of methods: it has no place for {key}.{near(str(key), names)} "
                    f"Known: {', '.join(names)}"
                )
        try:
            if content.get("tuned"):
                content = content | {"tuned": read_provenance(path.parent / str(content["tuned"]))}
            return cls(**content)
        except (UserError, TypeError, ValueError) as error:
            raise UserError(f"{path} describes no comparison of methods: {error}") from None

    def only(self, names: list[str] | None) -> "Comparison":
        """The comparison of some of its methods.

        Raises:
            UserError: If one is not in it.
        """
        for name in names or []:
            if name not in self.methods:
                raise UserError(f"the comparison has no method {name!r}.{near(name, self.methods)}")
        chosen = {name: facts for name, facts in self.methods.items() if names is None or name in names}
        return replace(self, methods=chosen)

    def images(self, seed: int) -> ImageData:
        """The data of one run.

        Raises:
            UserError: If an option is unknown or impossible.
        """
        data: ImageData = made(ImageData, self.data | {"seed": seed}, "data")
        return data

    def task(self, name: str, seed: int, **changes: Any) -> ImageTask:
        """The task of one run; its backbone is built later.

        Args:
            name: Name of the method.
            seed: The seed.
            changes: Arguments of the task to change, such as ``learning_rate``.

        Raises:
            UserError: If a name or an option is unknown or impossible.
        """
        facts = dict(self.methods[name])
        kind, method = str(facts.pop("task", "VisionLanguageTask")), facts.pop("method", None)
        if kind not in TASKS:
            raise UserError(f"{name}: there is no task {kind!r}.{near(kind, TASKS)} Known: {', '.join(TASKS)}")
        options = facts.pop("options", None) or {}
        if not isinstance(options, dict) or not isinstance(method, str):
            raise UserError(f"{name}: expected {{method: NAME, options: {{name: value}}}}, not {self.methods[name]}.")
        adapter = make_adapter(method, options, name, EXPLAINED)
        arguments = {**self.model, **facts, **changes, "seed": seed, "adapter": adapter}
        task: ImageTask = made(TASKS[kind], arguments, name)
        return task

    def rate(self, name: str) -> tuple[float, str]:
        """The learning rate of a method and how it was chosen: ``validation``, ``typed`` or ``default``."""
        option, facts = self.tuned_option(name), self.methods[name]
        value = float(getattr(self.task(name, self.seeds[0]), option))
        if chosen_for(self.tuned, self.model, name, facts):
            return value, "validation"
        return value, "default" if facts.get(option) is None else "typed"

    def tuned_option(self, name: str) -> str:
        """The learning rate that a method trains with: a linear probe has only that of its head."""
        return "head_learning_rate" if self.methods[name]["method"] == "LinearProbe" else "learning_rate"

    def check(self) -> None:
        """Reads the data and counts every method on the meta device: what cannot run is refused before anything runs.

        Raises:
            UserError: Names the method and what is wrong with it.
        """
        data = self.images(self.seeds[0])
        data.prepare_data()
        data.setup()
        for name in self.methods:
            task = self.task(name, self.seeds[0])
            clip = library_of(task.name) == "open_clip"
            model = meta_clip(task.name) if clip else meta_vit(task.name, getattr(task, "img_size", None))
            if clip and not isinstance(task, VisionLanguageTask):
                model = ImageTower(model)
            with errors_in(name):
                inject(model, task.adapter, task.targets)
            trains = any(parameter.requires_grad for parameter in model.parameters())
            if not trains and not isinstance(task, LinearHeadTask):
                raise UserError(f"{name}: {task.adapter.method()} trains nothing there; give it task: LinearHeadTask.")


def made(kind: Any, arguments: dict[str, Any], where: str) -> Any:
    """An object of a class, or one line about the argument that it does not take.

    Args:
        kind: The class.
        arguments: Its arguments by name.
        where: The place that they come from, for messages.

    Raises:
        UserError: An argument is unknown or impossible.
    """
    known = inspect.signature(kind).parameters
    for key in arguments:
        if key not in known:
            raise UserError(f"{where}: {kind.__name__} has no option {key!r}.{near(str(key), known)}")
    try:
        with errors_in(where):
            return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {kind.__name__} does not take these options ({error}).") from error
