"""The optimizer of an adapted model, AdamW or the method's own, and the learning rate of each of its tensors."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from randlora_pl.adapters.base import DeltaWeight
from randlora_pl.adapters.methods.full import BaseWeightMethod
from randlora_pl.adapters.operations import report_of, trainable_parameters
from randlora_pl.adapters.trained import chosen_tensors


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
    found = {update.get_parameter(name) for update in updates for name in update.undecayed}
    adapter = getattr(getattr(model, "adapter_report", None), "adapter", None)
    if isinstance(adapter, BaseWeightMethod) and not adapter.decays:
        found |= {*chosen_tensors(model, adapter).values()}
    return found


def by_rate(
    parameters: Iterable[nn.Parameter], factors: Mapping[nn.Parameter, float]
) -> list[tuple[float, list[nn.Parameter]]]:
    """Return parameters in their order by the factor of their learning rate: 1 first, then ascending."""
    found: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(factors.get(parameter, 1.0), []).append(parameter)
    return sorted(found.items(), key=lambda pair: (pair[0] != 1, pair[0]))


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


def make_optimizer(model: nn.Module, groups: Any = None, *, lr: float = 1e-3, **options: Any) -> Optimizer:
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
