"""State of an adapted model: its own tensors that train, kept buffers, and the hash of the weights that stay.

Own tensors train by the method, or alongside an adapter by choice. Kept buffers are those that training changes without
a gradient, of two kinds. Buffers of an update are named in `DeltaWeight.kept` and always stored. Buffers of the model
are statistics such as the running mean of BatchNorm, which change if a module of the base is in training mode. They are
stored if they differ from their values at injection. The hash does not depend on adapters, merged or not.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from itertools import accumulate

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import DeltaWeight
from randlora_pl.adapters.layers import AdaptedLayer, unsharded
from randlora_pl.adapters.methods.full import BaseWeightMethod
from randlora_pl.adapters.random_bases import matches
from randlora_pl.adapters.select import choose_beside
from randlora_pl.adapters.sites import is_quantized, out_and_in, weight_key
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.packed import unpacks_itself


def update_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the kept buffers of all updates in a module, by name; the module may be an update itself."""
    return {
        f"{path}.{name}".lstrip("."): getattr(each, name)
        for path, each in module.named_modules()
        if isinstance(each, DeltaWeight)
        for name in each.kept
    }


def update_tensors(delta: DeltaWeight) -> dict[str, Tensor]:
    """Return the tensors of an update that files store, by name: its parameters, and its kept buffers."""
    return {**dict(delta.named_parameters()), **update_buffers(delta)}


def kept_problems(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> list[str]:
    """Return the reasons that the kept buffers of a file, if they have the right shapes, cannot be loaded.

    Args:
        module: Model or update with the buffers to load.
        tensors: Tensors of the file.
        prefix: Prefix of the module's names in the file.
    """
    problems = []
    for path, each in module.named_modules():
        if not isinstance(each, DeltaWeight):
            continue
        start = f"{prefix}{path}." if path else prefix
        own = {name: getattr(each, name) for name in each.kept}
        there = {name: tensors[f"{start}{name}"] for name in own if f"{start}{name}" in tensors}
        odd = [name for name in there if _kind(there[name]) != _kind(own[name])]
        problems += [f"{start}{name} is {there[name].dtype} in the file and {own[name].dtype} here" for name in odd]
        if there and not odd and all(there[name].shape == own[name].shape for name in there):
            for name, size in each.indexes.items():
                places = there.get(name, torch.empty(0))
                inside = not len(places) or (int(places[0]) >= 0 and int(places[-1]) < size)
                if not inside or not bool((places[1:] > places[:-1]).all()):
                    problems.append(f"{start}{name} must be distinct places from 0 to {size - 1}, in ascending order")
    return problems


def _kind(tensor: Tensor) -> str:
    return "float" if tensor.is_floating_point() else "bool" if tensor.dtype == torch.bool else "integer"


def update_modules(model: nn.Module) -> set[nn.Module]:
    """Return the updates and all their child modules."""
    return {inner for each in model.modules() if isinstance(each, DeltaWeight) for inner in each.modules()}


def base_buffers(model: nn.Module, training: bool = False) -> dict[str, Tensor]:
    """Return the model's own persistent buffers that may be statistics, by name: floats, and scalar counters.

    Args:
        model: Model, with or without an adapter.
        training: If True, return only buffers of modules in training mode, which a forward pass may change.
    """
    updates = update_modules(model)
    return {
        f"{path}.{name}".lstrip("."): buffer
        for path, module in model.named_modules()
        if module not in updates and (module.training or not training)
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set and (buffer.is_floating_point() or not buffer.dim())
    }


def moved_buffers(model: nn.Module, before: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the model's own buffers that differ from ``before`` (default: their values at injection), by name."""
    before = getattr(getattr(model, "adapter_report", None), "buffers", {}) if before is None else before
    return {
        name: buffer
        for name, buffer in base_buffers(model).items()
        if name in before and not torch.equal(buffer.detach().cpu(), before[name].to(buffer.dtype))
    }


def kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return every kept buffer of a model with an adapter, by name."""
    return update_buffers(model) | moved_buffers(model)


def stored_tensors(module: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """Return what checkpoints of a module have of it: what trains, and the kept buffers of the adapted model in it."""
    kept = {id(buffer) for buffer in kept_buffers(model).values()}
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    return trained | {name: buffer for name, buffer in module.named_buffers() if id(buffer) in kept}


@torch.no_grad()
def reset_buffers(model: nn.Module) -> None:
    """Restore the model's own buffers to their values at injection."""
    before = getattr(getattr(model, "adapter_report", None), "buffers", {})
    for name, buffer in base_buffers(model).items():
        if name in before:
            buffer.copy_(before[name])


def forget_computed(model: nn.Module) -> None:
    """Clear values that modules have cached from old weights, by switching them to training mode and back."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module, mode in modes.items():
        module.training = mode


PLAIN_HASH = "plain_hash"
"""Attribute of a model with `hash_weights` before it was quantized."""


def hash_weights(model: nn.Module, without: Collection[str] = ()) -> str:
    """Return the SHA-256 of each parameter's name, shape and up to 1,024 evenly spaced values, rounded to bfloat16.

    The sample distinguishes weights quickly, also for models with billions of parameters. The rounding gives a model in
    float32 and bfloat16 the same hash. The hash is "" on the meta device, and for quantized weights,
    unless `PLAIN_HASH` is known. An adapted model has the hash of its base. Sharded weights are gathered one by one, a
    collective operation.

    Args:
        model: Model, with or without an adapter.
        without: Names of parameters to exclude.
    """
    if any(is_quantized(module) for module in model.modules()):
        known: str = getattr(model, PLAIN_HASH, "")
        return "" if without else known
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
        flat = unsharded(originals.get(id(parameter), parameter).detach()).flatten()
        sample = flat[:: max(1, flat.numel() // 1024)][:1024].to(torch.bfloat16)
        digest.update(f"{name}:{tuple(parameter.shape)}".encode())
        digest.update(sample.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


Tensors = dict[str, nn.Parameter]


def chosen_tensors(
    model: nn.Module, adapter: BaseWeightMethod, targets: list[str] | None = None, beside: Collection[str] = ()
) -> Tensors:
    """Return the model's own tensors that a method trains, by name; tied tensors once.

    Args:
        model: Model without the method.
        adapter: Method, which chooses among all tensors.
        targets: Layers whose weights alone train, see `choose_beside`.
        beside: Names of fully trained tensors alongside the method, which it leaves.

    Raises:
        UserError: A tensor is quantized; the method takes no targets; or a target is a part of a weight or fails.
    """
    own = {name: parameter for name, parameter in model.named_parameters() if name not in beside}
    if targets is None:
        split = [name.rpartition(".") for name in own]
        keys = {"".join(name) for name in split if adapter.selects(model.get_submodule(name[0]), name[2])}
    elif not adapter.takes_targets:
        raise UserError(f"{adapter.method()} chooses its tensors itself. Remove the targets.")
    else:
        sites = choose_beside(model, targets, adapter, beside).sites
        if rows := [site.shape.layer for site in sites if site.block]:
            raise UserError(f"{adapter.method()} trains whole weights, and {rows[0]} is rows of one. Set qkv instead.")
        keys = {weight_key(model, site) for site in sites}
    chosen = {name: parameter for name, parameter in own.items() if name in keys}
    _refuse_quantized(chosen, adapter.method(), "Choose a method that adds to the weights, such as RandLoRA.")
    return chosen


def _refuse_quantized(tensors: Tensors, chooser: str, mend: str) -> None:
    for name, parameter in tensors.items():
        if not parameter.is_floating_point() or unpacks_itself(parameter):
            raise UserError(f"{chooser} selects {name}, which is quantized and cannot train. {mend}")


def trained_tensors(model: nn.Module, trained: list[str] | None) -> Tensors:
    """Return the tensors that train fully alongside an adapter, by name; tied tensors once.

    Args:
        model: Model, with or without an adapter.
        trained: Regular expressions over names of modules or tensors, matched as targets are.

    Raises:
        UserError: A pattern matches nothing, is not a regular expression, or selects tensors that cannot train.
    """
    if not trained:
        return {}
    updates = {id(parameter) for module in update_modules(model) for parameter in module.parameters(recurse=False)}
    own = [
        (name, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) not in updates
    ]
    chosen: set[int] = set()
    for pattern in trained:
        try:
            selected = {
                id(parameter)
                for name, parameter in own
                # the tensor, or a module that contains it
                if any(matches(pattern, start) for start in accumulate(name.split("."), "{}.{}".format))
            }
        except re.error as error:
            raise UserError(f"trained {pattern!r} is not a regular expression: {error}.") from None
        if not selected:
            names = [name for name, _ in own]
            modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names if "." in name))
            last = dict.fromkeys(name.rpartition(".")[2] for name in modules)
            hint = near(pattern, [*last, *modules, *names])
            hint = hint or f" The last one is {modules[-1] if modules else names[-1]!r}."
            raise UserError(f"trained {pattern!r} matches no module with tensors of its own in this model.{hint}")
        chosen |= selected
    tensors = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}
    _refuse_quantized(tensors, "trained", "Exclude it.")
    return tensors


def frozen_outputs(model: nn.Module, adapted: Iterable[str], beside: Collection[str]) -> list[str]:
    """Return frozen linear layers that look like a new, untrained head, which is probably a mistake.

    They are outside the numbered blocks and are either the model's last layer or have a zero bias, as libraries
    initialize new heads. Output embeddings of language models and poolers are not heads.

    Args:
        model: Model with an adapter.
        adapted: Names of the adapted layers.
        beside: Names of fully trained tensors.
    """
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [
        (path, module)
        for path, module in model.named_modules()
        if out_and_in(module) is not None and not isinstance(module, nn.Conv2d)
    ]
    names = []
    for number, (path, module) in enumerate(layers, 1):
        bias = module._parameters.get("bias")
        new = bias is not None and not bias.is_meta and not bool(torch.count_nonzero(bias))
        outside = re.search(r"(?:^|\.)\d+\.|pool", path) is None and path != ""
        frozen = path not in adapted and f"{path}.weight" not in beside and module is not embeddings
        if frozen and outside and (new or number == len(layers)):
            names.append(path)
    return names
