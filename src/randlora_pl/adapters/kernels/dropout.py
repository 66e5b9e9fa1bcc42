"""Dropout on an update's input with cheap masks.

On a CPU `torch.nn.functional.dropout` of a layer's wide side takes nearly as long as a product of the layer, more
than half of it for random numbers. Here one 64-bit random number decides on four entries.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_pl.utils.device import on_cuda

AT_ONCE = 512
"""Tokens per chunk on a CPU: a few megabytes, which fit into its cache."""

_STEPS = 1 << 16


def in_parts(tokens: Tensor) -> Iterator[slice]:
    """Return slices of the first dimension (at least one) for chunked processing; one slice on a GPU."""
    if tokens.device.type != "cpu" or on_cuda(tokens) or torch.compiler.is_compiling():
        return iter((slice(None),))  # a loop would be recompiled for every number of tokens
    return (slice(start, start + AT_ONCE) for start in range(0, max(1, len(tokens)), AT_ONCE))


def drop_mask(x: Tensor, probability: float) -> Tensor:
    """Return a random mask of the entries of ``x`` to drop: bool, of its shape.

    On a CPU the probability is rounded to a multiple of 1/65536 if that changes it by less than a hundredth;
    `keep_scaling` uses the rounded value.
    """
    threshold = _threshold(x, probability)
    if threshold is None and torch.compiler.is_compiling():
        return torch.rand(x.shape, device=x.device) < probability
    if threshold is None:
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(probability)
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    entries = mask.view(-1)
    step = AT_ONCE * max(1, x.shape[-1] if x.ndim else 1)
    for start in range(0, entries.numel(), step):
        some = entries[start : start + step]
        words = torch.empty(-(-len(some) // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        torch.lt(words.view(torch.int16)[: len(some)], threshold - _STEPS // 2, out=some)
    return mask


def keep_scaling(x: Tensor, probability: float) -> float:
    """Return the factor that preserves the expected value of ``x`` with `drop_mask`."""
    threshold = _threshold(x, probability)
    return 1 / (1 - (probability if threshold is None else threshold / _STEPS))


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``x`` with zeros where the mask is True; ``x`` itself without a mask."""
    return x if mask is None else x.masked_fill(mask, 0)


def dropped(x: Tensor, probability: float) -> Tensor:
    """Return ``x`` with dropout, scaled to preserve the expected value."""
    if _threshold(x, probability) is None:
        return F.dropout(x, probability)
    return (x * keep_scaling(x, probability)).masked_fill_(drop_mask(x, probability), 0)


def _threshold(x: Tensor, probability: float) -> int | None:
    """Return how many of 65,536 values drop an entry; None to use PyTorch's own dropout."""
    threshold = round(probability * _STEPS)
    coarse = not 100 <= threshold <= _STEPS - 100
    plain = x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    vmapped = torch._C._functorch.maybe_current_level() is not None  # vmap has its own randomness rules
    if coarse or not plain or on_cuda(x) or vmapped:
        return None
    return threshold
