"""Trained state of a model, as adapter files store it."""

import re
from dataclasses import dataclass

from torch import Tensor, nn

from randlora_pl.adapters.io.base_hash import hash_weights
from randlora_pl.adapters.kept import kept_buffers, update_modules
from randlora_pl.adapters.operations import report_of


@dataclass(frozen=True)
class AdapterState:
    """Trained state of a model.

    Attributes:
        updates: Parameters of the updates, by name.
        own: Trainable parameters of the model itself, by name.
        kept: Kept buffers, by name.
        trained: Patterns of the fully trained tensors beside the adapter, for `inject`, or None.
        base_hash: Hash of the base model without these tensors; "" if it is unknown.
    """

    updates: dict[str, nn.Parameter]
    own: dict[str, nn.Parameter]
    kept: dict[str, Tensor]
    trained: list[str] | None
    base_hash: str

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {**self.updates, **self.own, **self.kept}


def adapter_state(model: nn.Module) -> AdapterState:
    """Return the trained state of a model, also if its parameters are frozen at the moment.

    Parameters whose ``requires_grad`` was set after `inject` are included as if they were in ``trained``.

    Raises:
        UserError: The model has no adapter.
    """
    report = report_of(model)
    inner = {id(own) for module in update_modules(model) for own in module.parameters(recurse=False)}
    updates = {name: each for name, each in model.named_parameters() if id(each) in inner}
    named = {row.layer for row in [*report.rows, *report.beside] if row.kind in ("tensor", "trained")}
    others = {name: each for name, each in model.named_parameters() if name not in updates}
    own = {name: each for name, each in others.items() if name in named or each.requires_grad}
    trained, base_hash = report.trained, report.base_hash
    if by_hand := own.keys() - named:
        trained = [*(trained or []), *(f"^{re.escape(name)}" for name in own if name in by_hand)]
        base_hash = hash_weights(model, own.keys()) if base_hash and not report.adapter.trains_base else ""
    return AdapterState(updates, own, kept_buffers(model), trained, base_hash)
