"""Checkpoints without the frozen part of an adapted model: what they leave out, and how it comes back at loading.

A state without its frozen part has a mark: digests of the frozen weights, of the method with its options, and of the
random bases. `inject` registers `complete_state` on the model. PyTorch calls it before it loads any state, also as part
of a larger module, so that such a state loads strictly.
"""

import hashlib
import json
from collections.abc import Collection, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters.derived import derived_buffers
from randlora_pl.adapters.trained import base_buffers, forget_computed, hash_weights, stored_tensors, update_modules
from randlora_pl.utils.errors import UserError

MARK = "adapter_report"
"""Name of the mark in a state, which FSDP2 needs to be an attribute of the model."""
_DIGEST = 32  # bytes of a SHA-256
_PARTS = {
    "base weights": "Build the module with the base model of the training.",
    "options of the adapter": "Inject the adapter of the training.",  # before the bases, whose sizes and seed it has
    "random bases": "Give the adapter the bases of the training.",
}


def leave_out_frozen(model: nn.Module, state: MutableMapping[str, Any], prefix: str = "") -> None:
    """Remove everything from a state that the base model and the seed give again, and add the mark.

    Trained tensors stay, also if they are frozen at the moment, and derived tensors, kept buffers, and the model's own
    buffers that may be statistics.

    Args:
        model: Model with an adapter.
        state: State dict of the model, or of a module that contains it.
        prefix: Prefix of the model's names in the state.
    """
    stored = _stored_names(model)
    for name in [name for name in state if name.startswith(prefix)]:
        if name.removeprefix(prefix) not in stored:
            del state[name]
    state[prefix + MARK] = _mark(model, stored)


def complete_state(model: nn.Module, state: MutableMapping[str, Any], prefix: str = "", *_: Any) -> None:
    """Add the model's own frozen tensors to a state of `leave_out_frozen`; leave any other state as it is.

    Args:
        model: Model with an adapter, which becomes unmerged.
        state: State to load, of the model or of a module that contains it.
        prefix: Prefix of the model's names in the state.

    Raises:
        UserError: The state belongs to other base weights, other random bases, or another adapter.
    """
    theirs = state.pop(prefix + MARK, None)
    if theirs is None:
        return
    given = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    there, here = (bytes(mark.tolist()) for mark in (theirs, _mark(model, given)))
    for number, (part, mend) in enumerate(_PARTS.items()):
        one, two = (mark[number * _DIGEST : (number + 1) * _DIGEST] for mark in (there, here))
        if one != two and any(one) and any(two):
            what = f"{part} {one.hex()[:12]}, this module has {two.hex()[:12]}"
            raise UserError(f"the checkpoint was trained with different {what}. {mend}")
    forget_computed(model)
    stored = _stored_names(model)
    for name, tensor in model.state_dict().items():  # which unmerges
        if name not in stored:
            state.setdefault(prefix + name, tensor)


def _stored_names(model: nn.Module) -> set[str]:
    """Return the names in a model's state dict that the base model and the seed do not give again."""
    inner = {id(own) for module in update_modules(model) for own in module.parameters(recurse=False)}
    updates = {name for name, own in model.named_parameters() if id(own) in inner}
    buffers = base_buffers(model) | derived_buffers(model)  # all that may be statistics: FSDP2 asks before it reads
    return updates | buffers.keys() | stored_tensors(model, model).keys()


def _mark(model: nn.Module, without: Collection[str]) -> Tensor:
    """Return the digests of frozen weights, adapter and random bases; zeros for one that is unknown or does not exist.

    Its size is fixed, so that sharded checkpoints can load it in place.
    """
    report = vars(model)["adapter_report"]
    adapter = hashlib.sha256(json.dumps(report.adapter.identity(), sort_keys=True).encode()).hexdigest()
    digests = (hash_weights(model, without), adapter, report.fingerprint)
    return torch.tensor([each for text in digests for each in bytes.fromhex(text.ljust(2 * _DIGEST, "0"))]).byte()
