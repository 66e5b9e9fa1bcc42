"""What an adapter file holds of a model, and how a fresh model is brought to the same state."""

import re
from dataclasses import dataclass

from torch import Tensor, nn

from randlora_pl.adapters.io.base_hash import hash_weights
from randlora_pl.adapters.kept import kept_buffers, update_modules
from randlora_pl.adapters.operations import report_of


@dataclass(frozen=True)
class AdapterState:
    """Everything that training has made of a model.

    Attributes:
        updates: Parameters of the updates, by name.
        own: Parameters of the model itself that train, by name.
        kept: Kept buffers, by name.
        trained: Patterns that give a fresh model the same tensors to train beside the adapter, None for none.
        base_hash: Hash of the base model without those; empty where that is not known any more.
    """

    updates: dict[str, nn.Parameter]
    own: dict[str, nn.Parameter]
    kept: dict[str, Tensor]
    trained: list[str] | None
    base_hash: str

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        return {**self.updates, **self.own, **self.kept}


def adapter_state(model: nn.Module) -> AdapterState:
    """Return what training has made of a model, whether or not its parameters train at the moment.

    Parameters that a user has set to train after `inject` count as if they had been named in ``trained``.

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
