"""A decoder with an adapter from elsewhere, as a task of ours that is tested, trained on and merged like any other."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from randlora_pl.interop.base_model import Base
from randlora_pl.interop.foreign.adapter import Foreign
from randlora_pl.language.tasks.causal_lm import CausalLMTask
from randlora_pl.utils.adapter_schema import check_arguments
from randlora_pl.utils.errors import UserError


@dataclass(frozen=True)
class Imported:
    """What such an adapter becomes.

    Attributes:
        base: Its base model.
        arguments: Of the task's constructor, besides the adapter and its targets.
    """

    base: Base
    arguments: dict[str, Any]

    @classmethod
    def of(cls, name: str, pretrained: str | None, saved: Mapping[str, Any]) -> "Imported":
        """Builds the base model.

        Args:
            name: A name of the Hub, or a folder.
            pretrained: A folder with its weights, or ``random``.
            saved: Arguments of the task that it was exported from; empty for others.

        Raises:
            UserError: The model cannot be had, or the arguments are not those of the task.
        """
        check_arguments(CausalLMTask.__init__, dict(saved), "task.json")
        given = {"name": name, "pretrained": pretrained, "quantize": None}
        arguments = {**saved, **given}
        task = CausalLMTask(**arguments)
        model = task.build()
        return cls(Base(model, model, task.identity), arguments)

    def save(self, foreign: Foreign, path: Path) -> Path:
        """Writes the adapter.

        Args:
            foreign: The adapter.
            path: A folder, or one file.

        Raises:
            UserError: It has tensors beside its updates, for which this task has no place.
        """
        if foreign.extra:
            raise UserError(f"{foreign.source}: {next(iter(foreign.extra))} is no update, and a decoder has no head.")
        task = CausalLMTask(**{**self.arguments, "adapter": foreign.adapter, "targets": foreign.targets})
        task.configure_model()
        foreign.fill(task.model)
        return task.save(path)

    def next(self, path: Path) -> str:
        """The next command."""
        return f"Next: randlora-pl predict --adapter {path} --texts FILE"
