"""A checked adapter file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from randlora_pl.adapters.base import Adapter
from randlora_pl.adapters.random_bases import Bases

EXTRA = "extra."
"""Prefix of tensors that belong to no layer of the model, such as a classification head."""


@dataclass(frozen=True)
class AdapterFile:
    """A checked adapter.

    Attributes:
        path: The folder, or the file.
        adapter: The method and its options.
        targets: The targets it was injected with.
        tensors: The trained tensors and the kept buffers by name.
        extra: Tensors of no layer (a head), by name without the prefix.
        config: Everything in ``adapter_config.json``.
        bases: Random bases that no seed gives, as after an import; usually None.
    """

    path: Path
    adapter: Adapter
    targets: list[str] | None
    tensors: dict[str, Tensor]
    extra: dict[str, Tensor]
    config: dict[str, Any]
    bases: Bases | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """What was saved beside the adapter: task, class names, prompts, a summary of the training."""
        return dict(self.config.get("metadata", {}))

    @property
    def trained(self) -> list[str] | None:
        """Patterns of what trained whole beside the adapter, as `inject` takes them."""
        return self.config.get("trained")

    @property
    def kept(self) -> list[str]:
        """Names of those tensors that are kept buffers, and did not train by a gradient."""
        return list(self.config.get("kept", []))

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """Shape of every adapted weight, (out, in), by layer name."""
        return {name: tuple(shape) for name, shape in self.config.get("layers", {}).items()}
