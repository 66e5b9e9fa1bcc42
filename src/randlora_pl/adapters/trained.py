"""Selection of a model's own trainable tensors: by the method, or by the user beside an adapter."""

import re
from collections.abc import Collection, Iterable
from dataclasses import replace
from itertools import accumulate

import torch
from torch import nn

from randlora_pl.adapters.base import Adapter
from randlora_pl.adapters.kept import update_modules
from randlora_pl.adapters.layers.weight_access import out_and_in
from randlora_pl.adapters.methods.full import BaseWeightMethod
from randlora_pl.adapters.targets.select import Selection, choose
from randlora_pl.adapters.weights import matches
from randlora_pl.utils.errors import UserError, near

Tensors = dict[str, nn.Parameter]


def chosen_tensors(model: nn.Module, adapter: BaseWeightMethod) -> Tensors:
    """Return the model's own tensors that a method trains, by name; tied tensors once."""
    split = [(name.rpartition("."), parameter) for name, parameter in model.named_parameters()]
    return {
        f"{path}{dot}{tensor}": parameter
        for (path, dot, tensor), parameter in split
        if adapter.selects(model.get_submodule(path), tensor)
    }


def trained_tensors(model: nn.Module, trained: list[str] | None) -> Tensors:
    """Return the tensors that train fully beside an adapter, by name; tied tensors once.

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
            found = {
                id(parameter)
                for name, parameter in own
                # the tensor, or a module that contains it
                if any(matches(pattern, start) for start in accumulate(name.split("."), "{}.{}".format))
            }
        except re.error as error:
            raise UserError(f"trained {pattern!r} is not a regular expression: {error}.") from None
        if not found:
            names = [name for name, _ in own]
            modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names if "." in name))
            last = dict.fromkeys(name.rpartition(".")[2] for name in modules)
            hint = near(pattern, [*last, *modules, *names])
            hint = hint or f" The last one is {modules[-1] if modules else names[-1]!r}."
            raise UserError(f"trained {pattern!r} matches no module with tensors of its own in this model.{hint}")
        chosen |= found
    tensors = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}
    if whole := [name for name, parameter in tensors.items() if not parameter.is_floating_point()]:
        raise UserError(f"trained selects {whole[0]}, which is quantized and cannot train. Exclude it.")
    return tensors


def choose_beside(model: nn.Module, targets: list[str] | None, adapter: Adapter, beside: Collection[str]) -> Selection:
    """Return the weights of the targets (`choose`), without fully trained weights.

    Args:
        model: Any module.
        targets: See `choose`.
        adapter: Method and its options.
        beside: Names of fully trained tensors.

    Raises:
        UserError: See `choose`; or no weight is left.
    """
    chosen = choose(model, targets, adapter.qkv == "split", adapter)
    left = [site for site in chosen.sites if not trains_whole(site.path, beside)]
    if not left:
        first = chosen.sites[0].shape.layer
        raise UserError(
            f"every layer of the targets is in trained ({first} ...), so nothing is adapted. Change either."
        )
    return replace(chosen, sites=left)


def trains_whole(path: str, beside: Collection[str]) -> bool:
    """Return True if a layer's weight is one of the fully trained tensors."""
    return any(f"{path}.{name}".lstrip(".") in beside for name in ("weight", "in_proj_weight"))


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
    found = []
    for number, (path, module) in enumerate(layers, 1):
        bias = module._parameters.get("bias")
        new = bias is not None and not bias.is_meta and not bool(torch.count_nonzero(bias))
        outside = re.search(r"(?:^|\.)\d+\.|pool", path) is None and path != ""
        frozen = path not in adapted and f"{path}.weight" not in beside and module is not embeddings
        if frozen and outside and (new or number == len(layers)):
            found.append(path)
    return found
