"""Content of an adapter file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from randlora_pl.adapters.base import Adapter
from randlora_pl.adapters.derived import Sketches
from randlora_pl.adapters.random_bases import Bases

EXTRA = "extra."
"""Prefix of tensors that do not belong to a layer of the model, such as a classification head."""


@dataclass(frozen=True)
class AdapterFile:
    """Validated content of an adapter folder or file.

    Examples:
        >>> file = read_adapter("runs/cars/adapter")
        >>> file.adapter.method(), file.layers["blocks.0.attn.qkv"]
        ('RandLoRA', (192, 64))

    Attributes:
        path: Path of the folder or file.
        adapter: Method and its options.
        targets: Targets of the injection.
        tensors: Trained tensors and kept buffers by name.
        extra: Tensors outside the model's layers (a head), by name without the prefix.
        config: Content of ``adapter_config.json``.
        bases: Random bases that no seed generates, for example after an import; usually None.
    """

    path: Path
    adapter: Adapter
    targets: list[str] | None
    tensors: dict[str, Tensor] = field(repr=False)
    extra: dict[str, Tensor] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    bases: Bases | None = field(default=None, repr=False)

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata: task, class names, prompts, summary of the training."""
        return dict(self.config.get("metadata", {}))

    @property
    def trained(self) -> list[str] | None:
        """Patterns of fully trained tensors, for `inject`."""
        return self.config.get("trained")

    @property
    def kept(self) -> list[str]:
        """Names of the kept buffers among the tensors, which have no gradient."""
        return list(self.config.get("kept", []))

    @property
    def derived(self) -> Sketches:
        """Sketches of the tensors that are derived from the base model's weights."""
        return dict(self.config.get("derived", {}))

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """Shapes (out, in) of the adapted weights, by layer name."""
        return {name: tuple(shape) for name, shape in self.config.get("layers", {}).items()}
