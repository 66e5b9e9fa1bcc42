"""Bytes and operations of ATen's operators, from their shapes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from randlora_pl.lab.bench import counter
from tests.support.trace.custom_costs import CUSTOM, Cost, size_of

_FLOPS = counter().flop_registry
_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "lift_fresh", "resize_",
    "set_", "_has_compatible_shallow_copy_type",
}  # fmt: skip
_ONLY_WRITE = {
    "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "rand_like",
    "randn_like", "zero_", "fill_", "bernoulli_", "random_", "uniform_", "normal_", "arange", "eye", "scalar_tensor",
}  # fmt: skip
_GATHER = {"embedding": 0, "index": 0, "index_select": 0, "gather": 0, "nll_loss_forward": 0, "take": 0}
"""Operators that read of one argument only what they return, and the number of this argument."""
_PER_LAUNCH = 36
"""Tensors of one launch of an operator on lists of tensors (aten/src/ATen/native/cuda/MultiTensorApply.cuh)."""
_BLOCKS, _CHUNK = 320, 65536
"""Blocks of one launch, and entries of a block."""


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors among the arguments or results of a call, in order."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in tensors_in(value)]
    return []


def is_free(name: str) -> bool:
    """Return True if an ATen operator only allocates memory, or changes what a tensor says of itself."""
    return name in _FREE


def cost_of(
    operator: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    result: Any,
    changed: Sequence[Tensor],
    new: Sequence[Tensor],
) -> Cost:
    """Return the cost of a call.

    Args:
        operator: An overload of ``torch.ops``.
        args: Its arguments by position.
        kwargs: Its other arguments.
        result: What it returned.
        changed: Arguments that it has changed.
        new: Results in memory of their own.
    """
    name = operator.name().partition(".")[0]
    if name in CUSTOM:
        return CUSTOM[name](args, result)
    short = name.removeprefix("aten::")
    inputs = tensors_in([*args, *kwargs.values()])
    written = sum(map(size_of, (*new, *changed)))
    if short in _ONLY_WRITE:
        inputs = []
    elif short == "copy_":
        inputs = inputs[1:2]
    read = sum(map(size_of, {id(tensor): tensor for tensor in inputs}.values()))  # twice the same is read once
    if short in _GATHER and inputs:
        table = inputs[_GATHER[short]]
        read += min(sum(map(size_of, new)), size_of(table)) - size_of(table)
    elif short in ("index_copy_", "index_put_", "index_add_", "slice_scatter"):
        source = size_of(inputs[-1])
        read, written = read - size_of(inputs[0]), source
    flops = 0
    if (formula := _FLOPS.get(operator.overloadpacket)) is not None:
        flops = int(formula(*args, **kwargs, out_val=result))
    lists = [value for value in args if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor)]
    launches = _launches(lists[0]) if lists and short.startswith(("_foreach", "_fused")) else 1
    return Cost(flops, read, written, launches)


def _launches(tensors: Sequence[Tensor]) -> int:
    blocks = sum(-(-tensor.numel() // _CHUNK) for tensor in tensors)
    return max(-(-len(tensors) // _PER_LAUNCH), -(-blocks // _BLOCKS))


def products_dtype(args: Sequence[Any]) -> torch.dtype:
    """Return the dtype of the first floating-point argument, in which a product runs."""
    kinds = (tensor.dtype for tensor in tensors_in(list(args)) if tensor.is_floating_point())
    return next(kinds, torch.float32)
