"""Imported adapters of decoders, as a task that can be tested, trained and merged."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from randlora_pl.interop.base_model import Base
from randlora_pl.interop.foreign.adapter import ExternalAdapter
from randlora_pl.language.tasks.causal_lm import CausalLMTask
from randlora_pl.utils.adapter_schema import check_arguments
from randlora_pl.utils.errors import UserError


@dataclass(frozen=True)
class ImportedDecoder:
    """Base model and task arguments of an imported adapter.

    Attributes:
        base: Base model.
        arguments: Arguments of the task's constructor, besides the adapter and its targets.
    """

    base: Base
    arguments: dict[str, Any]

    @classmethod
    def of(cls, name: str, pretrained: str | None, saved: Mapping[str, Any]) -> "ImportedDecoder":
        """Build the base model.

        Args:
            name: Hub id or folder.
            pretrained: Folder with its weights, or ``random``.
            saved: Arguments of the task it was exported from; empty if unknown.

        Raises:
            UserError: The model is not available, or the arguments do not belong to the task.
        """
        check_arguments(CausalLMTask, dict(saved), "task.json")
        given = {"name": name, "pretrained": pretrained, "quantize": None}
        arguments = {**saved, **given}
        task = CausalLMTask(**arguments)
        model = task.build()
        return cls(Base(model, model, task.identity), arguments)

    def save(self, foreign: ExternalAdapter, path: Path) -> Path:
        """Save the adapter.

        Args:
            foreign: Imported adapter.
            path: Output folder or file.

        Raises:
            UserError: It has tensors beside its updates, which this task cannot store.
        """
        if foreign.extra:
            raise UserError(
                f"{foreign.source}: {next(iter(foreign.extra))} is not an update, and a decoder has no head."
            )
        task = CausalLMTask(**{**self.arguments, "adapter": foreign.adapter, "targets": foreign.targets})
        task.configure_model()
        foreign.fill(task.model)
        return task.save(path)

    def next(self, path: Path) -> str:
        """Return the next command to run."""
        return f"Next: randlora-pl predict --adapter {path} --texts FILE"
