"""Operations on adapted models: merge, unmerge, merge_and_unload, disable, access to updates, and their optimizer."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import DeltaWeight
from randlora_pl.adapters.injection import InjectionReport
from randlora_pl.adapters.layers import AdaptedLayer, RowBlocks, WeightedSum, set_fast_paths, unsharded
from randlora_pl.adapters.methods.full import BaseWeightMethod
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.adapters.trained import PLAIN_HASH, chosen_tensors
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.packed import unpacks_itself


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Return the adapted layers by path, with attention layers that only call an adapted projection.

    Examples:
        >>> report = inject(model, LoRA(rank=4))
        >>> len(adapted_layers(model)) == len(report.rows)
        True
    """
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLayer)}


def report_of(model: nn.Module) -> InjectionReport:
    """Return the injection report of a model.

    Raises:
        UserError: The model has no adapter, or a weighted sum of adapters.
    """
    report = getattr(model, "adapter_report", None)
    if not isinstance(report, InjectionReport):
        if _is_sum(model):
            raise UserError(
                "the model has a weighted sum of adapters, not one adapter. Activate a single one first, or write the "
                "sum with randlora-pl adapter add."
            )
        raise UserError("the model has no adapter. Call inject(model, adapter) or load_adapter(model, folder) first.")
    return report


def _is_sum(model: nn.Module) -> bool:
    return any(isinstance(layer.delta, WeightedSum) for layer in adapted_layers(model).values())


def _trains_base(model: nn.Module) -> bool:
    """Return True if the model's own tensors train."""
    if _is_sum(model):  # updates only, without a report
        return False
    report = report_of(model)
    return report.adapter.trains_base and bool(report.rows)


def merge(model: nn.Module, strict: bool = True) -> None:
    """Write every effective weight into its layer, and keep the frozen weights for `unmerge`. Idempotent.

    For evaluation: the updates stay in the model and its state dict. `merge_and_unload` gives plain layers instead.

    Examples:
        >>> report = inject(model, LoRA(rank=4))
        >>> merge(model)
        >>> unmerge(model)

    Args:
        model: Model with an adapter.
        strict: If False, leave layers that cannot be merged as they are: quantized ones, and updates that depend on
            the input (HydraLoRA). They give the same outputs unmerged.

    Raises:
        UserError: An update is not finite, or a layer cannot be merged. The merge is undone then.
    """
    layers = adapted_layers(model)
    stuck = {path: problem for path, layer in layers.items() if (problem := layer.obstacle(path)) is not None}
    if strict and stuck:
        raise next(iter(stuck.values()))
    done = []
    for path, layer in layers.items():
        if layer.merged or layer.delta is None or path in stuck:
            continue
        layer.merge()
        done.append(layer)
        if not layer.adapted_weight.is_meta and not unsharded(torch.isfinite(layer.adapted_weight).all()):
            for merged in done:
                merged.unmerge()
            raise UserError(
                f"the weight of {path or 'the model'} with its update is not finite (NaN or infinity), "
                "so it is not merged: training diverged. Lower the learning rate or alpha."
            )


def unmerge(model: nn.Module) -> None:
    """Restore every frozen weight exactly. Idempotent.

    Examples:
        >>> file = load_adapter(model, "runs/cars/adapter")
        >>> merge(model)
        >>> unmerge(model)
    """
    for layer in adapted_layers(model).values():
        layer.unmerge()


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Convert the model in place to plain layers with merged weights, and return it.

    The state dict has the same keys as before `inject`, and every parameter trains, as in a new model. This cannot be
    undone; load the adapter file into the base model instead.

    Examples:
        >>> file = load_adapter(model, "runs/cars/adapter")
        >>> torch.save(merge_and_unload(model).state_dict(), "merged.pt")

    Raises:
        UserError: An update cannot be merged (`merge`). The model is unchanged then.
    """
    merge(model)
    detach(model)
    vars(model).pop(PLAIN_HASH, None)
    for parameter in model.parameters():
        if parameter.is_floating_point() and not unpacks_itself(parameter):  # others are quantized
            parameter.requires_grad_(True)
    return model


def detach(model: nn.Module) -> None:
    """Convert adapted layers to plain ones with their current weights; call `unmerge` first for the base weights."""
    set_fast_paths(model, True)
    for layer in adapted_layers(model).values():
        layer.detach()
    for module in model.modules():  # a separately adapted submodule has its own report
        module.__dict__.pop("adapter_report", None)
        if (loading := module.__dict__.pop("adapter_loading", None)) is not None:
            loading.remove()


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Disable the updates inside a ``with`` block, merged or not; tensors of ``trained`` keep their trained values.

    Examples:
        >>> file = load_adapter(model, "runs/cars/adapter")
        >>> with disabled(model):
        ...     base = model(images)

    Raises:
        UserError: The method trains the base weights, of which no copy is stored.
    """
    if _trains_base(model):
        raise UserError(
            f"{report_of(model).adapter.method()}: the method trains the model's own weights and no base model is "
            "left, so disabling the update is not possible. Build the base model again."
        )
    layers = adapted_layers(model).values()
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


@torch.no_grad()
def delta_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the update of every adapted weight, (out, in), by the layer names of the report.

    For methods that are not additive (DoRA) it is the effective weight minus the frozen one.

    Examples:
        >>> file = load_adapter(model, "runs/cars/adapter")
        >>> delta_weights(model)["blocks.0.attn.qkv"].shape
        torch.Size([192, 64])
    """
    updates: dict[str, Tensor] = {}
    for path, layer in adapted_layers(model).items():
        if layer.delta is None:
            continue
        if isinstance(layer.delta, RowBlocks):
            for name, block in layer.delta.blocks().items():
                rows = slice(*layer.delta.rows[name])
                updates[f"{path}.{name}".lstrip(".")] = block.change(layer.base_weight[rows]).detach()
        else:
            name = path if layer.weight_name == "weight" else f"{path}.in_proj".lstrip(".")
            updates[name] = layer.delta.change(layer.base_weight).detach()
    return updates


@torch.no_grad()
def weight_updates(model: nn.Module) -> dict[str, Tensor]:
    """Return the update of every adapted tensor, in its shape, by its key in the base model's state dict.

    A packed weight with separately adapted blocks is one tensor, zero in blocks without an update.
    """
    return {
        f"{path}.{layer.weight_name}".lstrip("."): layer.swap_layout(layer.delta.change(layer.base_weight)).detach()
        for path, layer in adapted_layers(model).items()
        if layer.delta is not None
    }


def use_bases(model: nn.Module, bases: Bases) -> None:
    """Replace the random bases of every update by other bases, in place.

    Raises:
        UserError: The bases are too small for a layer, or no update has bases. Nothing is changed then.
    """
    holders = with_bases(model.modules())
    if not holders:
        raise UserError(f"{report_of(model).adapter.method()} has no random bases to replace.")
    if problem := basis_size_error(bases, holders.values()):
        raise UserError(f"{problem}.")
    # Copies, because the originals would move with this model.
    own = {device: copy.deepcopy(bases).to(device) for device in {before.A.device for before in holders.values()}}
    for holder, before in holders.items():
        holder.bases = own[before.A.device]
    report = report_of(model)
    report.fingerprint, report.stored_bases = bases.fingerprint, bases


def with_bases(modules: Iterable[nn.Module]) -> dict[nn.Module, Bases]:
    """Return the modules that have random bases, with these."""
    held = ((module, getattr(module, "bases", None)) for module in modules)
    return {module: bases for module, bases in held if isinstance(bases, Bases)}


def basis_size_error(bases: Bases, others: Iterable[Bases]) -> str:
    """Return the reason that these bases cannot replace others, or ""."""
    for other in dict.fromkeys(others):
        have, want = ((*each.A.shape, *each.B.shape) for each in (bases, other))
        if any(mine < needed for mine, needed in zip(have, want, strict=True)):
            return (
                f"its bases A {tuple(bases.A.shape)} and B {tuple(bases.B.shape)} are too small, "
                f"{tuple(other.A.shape)} and {tuple(other.B.shape)} are needed"
            )
    return ""


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name.

    Examples:
        >>> report = inject(model, RandLoRA(rank=6))
        >>> optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-3)
    """
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def set_train_mode(model: nn.Module, mode: bool = True) -> None:
    """Set the mode of trainable modules; frozen layers stay in eval mode, without dropout and with fixed statistics.

    Only updates and fully trained modules change mode; with full fine-tuning all modules do, unless it has targets.

    Examples:
        >>> report = inject(model, LoRA(rank=4, dropout=0.1))
        >>> set_train_mode(model)  # instead of model.train()
    """
    report = getattr(model, "adapter_report", None)
    model.train(mode and _trains_base(model) and getattr(report, "targets", None) is None)
    for module in model.modules():
        if isinstance(module, DeltaWeight):
            module.train(mode)
    names = {row.layer for row in report.beside} if report is not None else set()
    beside = {id(parameter) for name, parameter in model.named_parameters() if name in names}
    for module in model.modules():
        own = {id(parameter) for parameter in module.parameters()}
        if own and own <= beside:
            module.train(mode)


def rates_of(model: nn.Module) -> dict[nn.Parameter, float]:
    """Return the factors of the learning rate (`DeltaWeight.rates`) of a model's parameters, 1 for all others.

    Factors of nested updates are multiplied.
    """
    factors: dict[nn.Parameter, float] = {}
    for update in model.modules():
        for name, factor in update.rates.items() if isinstance(update, DeltaWeight) else ():
            for path, parameter in update.named_parameters():
                if f"{path}.".startswith(f"{name}."):
                    factors[parameter] = factors.get(parameter, 1.0) * factor
    return factors


def undecayed(model: nn.Module) -> set[nn.Parameter]:
    """Return what trains without weight decay in a model: `DeltaWeight.undecayed`, and the biases of BitFit."""
    updates = [module for module in model.modules() if isinstance(module, DeltaWeight)]
    parameters = {update.get_parameter(name) for update in updates for name in update.undecayed}
    report = getattr(model, "adapter_report", None)
    if report is not None and isinstance(report.adapter, BaseWeightMethod) and not report.adapter.decays:
        parameters |= {*chosen_tensors(model, report.adapter).values()}
    return parameters


def by_rate(
    parameters: Iterable[nn.Parameter], factors: Mapping[nn.Parameter, float]
) -> list[tuple[float, list[nn.Parameter]]]:
    """Return parameters in their order by the factor of their learning rate: 1 first, then ascending."""
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(factors.get(parameter, 1.0), []).append(parameter)
    return sorted(groups.items(), key=lambda pair: (pair[0] != 1, pair[0]))


def parameter_groups(model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """Return what trains in a model, with the learning rate of each tensor, and no decay for some (`undecayed`).

    Examples:
        >>> report = inject(model, RandLoRA(rank=6))
        >>> optimizer = torch.optim.SGD(parameter_groups(model, learning_rate=1e-3), momentum=0.9)

    Args:
        model: Model after `inject`.
        learning_rate: Rate of the tensors to which the method gives no other.
    """
    still, groups = undecayed(model), list[dict[str, Any]]()
    for factor, some in by_rate(trainable_parameters(model).values(), rates_of(model)):
        rate, decaying = learning_rate * factor, [each for each in some if each not in still]
        if decaying:
            groups.append({"params": decaying, "lr": rate})
        if len(decaying) < len(some):
            groups.append({"params": [each for each in some if each in still], "lr": rate, "weight_decay": 0.0})
    return groups


def make_optimizer(model: nn.Module, groups: Any = None, *, lr: float = 1e-3, **options: Any) -> torch.optim.Optimizer:
    """Return the optimizer of what trains in a model: AdamW, or the own optimizer of GaLore and Fira.

    Examples:
        >>> report = inject(model, GaLore(rank=4))
        >>> optimizer = make_optimizer(model, lr=1e-3, weight_decay=0.1)

    Args:
        model: Model after `inject`.
        groups: Parameters or parameter groups. Default: all that train, see `parameter_groups`.
        lr: Learning rate.
        **options: Other options of AdamW.

    Raises:
        UserError: The model has no adapter.
    """
    groups = parameter_groups(model, lr) if groups is None else groups
    return report_of(model).adapter.optimizer(model, groups, lr=lr, **options)
