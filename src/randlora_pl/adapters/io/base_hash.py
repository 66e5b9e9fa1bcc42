"""Which base model an adapter belongs to: a hash of its weights that no adapter, merged or not, changes."""

import hashlib
from collections.abc import Collection

import torch
from torch import nn

from randlora_pl.adapters.kept import update_modules
from randlora_pl.adapters.layers.adapted import AdaptedLayer
from randlora_pl.adapters.layers.weight_access import is_quantized

_SAMPLES = 1024


def hash_weights(model: nn.Module, without: Collection[str] = ()) -> str:
    """SHA-256 of every parameter's name, shape and up to 1,024 evenly spaced values, rounded to bfloat16.

    A sample tells other weights apart at once, also for models of billions of parameters; the rounding
    makes a model the same in float32 and bfloat16. Empty on the meta device, and where weights are quantised,
    which do not tell what they were before. An adapted model has the hash of its base.

    Args:
        model: The model.
        without: Names of parameters that do not count.
    """
    if any(is_quantized(module) for module in model.modules()):
        return ""
    originals = {
        id(layer.adapted_weight): layer.frozen_weight
        for layer in model.modules()
        if isinstance(layer, AdaptedLayer) and layer.frozen_weight is not None
    }
    updates = {id(own) for module in update_modules(model) for own in module.parameters(recurse=False)}
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name in without or id(parameter) in updates:
            continue
        if parameter.is_meta:
            return ""
        flat = originals.get(id(parameter), parameter).detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to(torch.bfloat16)
        digest.update(f"{name}:{tuple(parameter.shape)}".encode())
        digest.update(sample.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
