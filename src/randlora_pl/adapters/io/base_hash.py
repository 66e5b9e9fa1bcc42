"""Hash of a base model's weights, which does not depend on adapters, merged or not."""

import hashlib
from collections.abc import Collection

import torch
from torch import nn

from randlora_pl.adapters.kept import update_modules
from randlora_pl.adapters.layers.adapted import AdaptedLayer
from randlora_pl.adapters.layers.weight_access import is_quantized

_SAMPLES = 1024


def hash_weights(model: nn.Module, without: Collection[str] = ()) -> str:
    """Return the SHA-256 of each parameter's name, shape and up to 1,024 evenly spaced values, rounded to bfloat16.

    The sample distinguishes weights quickly, also for models with billions of parameters. The rounding gives a model in
    float32 and bfloat16 the same hash. The hash is "" on the meta device, and for quantized weights, whose original
    values are unknown. An adapted model has the hash of its base.

    Args:
        model: Model, with or without an adapter.
        without: Names of parameters to exclude.
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
