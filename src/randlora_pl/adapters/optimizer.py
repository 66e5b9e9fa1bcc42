"""The optimizer of an adapted model: AdamW, or the method's own."""

from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from randlora_pl.adapters.methods.whole.full import BaseWeightMethod
from randlora_pl.adapters.operations import report_of, trainable_parameters


def make_optimizer(model: nn.Module, groups: Any = None, **options: Any) -> Optimizer:
    """Return the optimizer of what trains in a model: AdamW, or the own optimizer of GaLore and Fira.

    Examples:
        >>> report = inject(model, GaLore(rank=4))
        >>> optimizer = make_optimizer(model, lr=1e-3, weight_decay=0.1)

    Args:
        model: Model after `inject`.
        groups: Parameters or parameter groups. Default: all parameters of the model that train.
        **options: Options of AdamW, such as ``lr``.

    Raises:
        UserError: The model has no adapter.
    """
    groups = list(trainable_parameters(model).values()) if groups is None else groups
    adapter = report_of(model).adapter
    if isinstance(adapter, BaseWeightMethod):
        return adapter.optimizer(model, groups, **options)
    return AdamW(groups, **options)


def optimizer_numbers(model: nn.Module) -> int:
    """Return the numbers in the state of the optimizer of `make_optimizer` and of the method's procedure.

    AdamW stores two per trainable parameter.

    Raises:
        UserError: The model has no adapter.
    """
    adapter, procedure = report_of(model).adapter, report_of(model).procedure
    if isinstance(adapter, BaseWeightMethod):
        return adapter.optimizer_numbers(model)
    adam = 2 * sum(parameter.numel() for parameter in trainable_parameters(model).values())
    return adam + (procedure.state_size() if procedure else 0)
