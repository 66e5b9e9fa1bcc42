"""Tangent kernels at the start of training: the alignment of a method's with full fine-tuning's.

With the losses l_i of single samples and the trained numbers theta, the kernel of a method is

    K[i, j] = <dl_i / dtheta, dl_j / dtheta>.

To first order, a step of gradient descent on sample j lowers l_i by the learning rate times K[i, j]. Losses rather than
outputs are used, because every task has them, and a step follows their gradients. Full fine-tuning of one layer has

    K_full[i, j] = sum over tokens s of i and t of j of <x_s, x_t> <g_s, g_t>,

with the inputs x of the layer and the gradients g of its outputs; the kernels of layers add up. The alignment
<K, K_full> / (||K|| ||K_full||), not centered, does not depend on scales such as alpha and the learning rate. The error
at the best scale, min_s ||s K - K_full|| / ||K_full||, is (1 - alignment^2)^(1/2).

A tensor to which its method gives another learning rate counts with this factor. AdamW's division of each number of a
step by the size of its gradients is not in a kernel.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from randlora_pl.adapters.layers import AdaptedLayer, RowBlocks
from randlora_pl.adapters.operations import adapted_layers, merge, rates_of, report_of
from randlora_pl.adapters.sites import is_quantized
from randlora_pl.lab.analysis.figures import colors, footnote, legend, new_figure
from randlora_pl.lab.analysis.models import gram
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.text import byte_size, for_figure

Sample = TypeVar("Sample")
_BYTES = 4  # of a number of a gradient
_NUMBERS = 1 << 23  # of gradients that are float64 at a time


@dataclass(frozen=True)
class Trained:
    """Tensor to take gradients of, the factor of its learning rate, and what counts of its gradient."""

    tensor: nn.Parameter
    factor: float = 1.0
    kept: Callable[[Tensor], Tensor] = lambda gradient: gradient


def trained_tensors(model: nn.Module) -> list[Trained]:
    """Return what a method trains in the layers that it adapts, or refuse one that trains none or has an own optimizer.

    Heads, prompts and tensors that train fully alongside the method are left out: full fine-tuning has the same.
    """
    adapter, factors = report_of(model).adapter, rates_of(model)
    if adapter.own_optimizer:
        raise UserError(f"{adapter.method()} has an optimizer of its own, whose steps have no kernel. Leave it out.")
    updates = [each for layer in adapted_layers(model).values() if layer.delta for each in layer.delta.parameters()]
    candidates = updates if adapter.freezes else model.parameters()
    trained = dict.fromkeys(each for each in candidates if each.requires_grad)
    if not trained:
        raise UserError(f"{adapter.method()} trains no weight of a layer, so it has no kernel. Leave it out.")
    return [Trained(each, factors.get(each, 1.0)) for each in trained]


def layer_weights(model: nn.Module) -> list[Trained]:
    """Return the weights that full fine-tuning of the adapted layers trains; a `UserError` refuses quantized ones."""
    weights: dict[nn.Parameter, Trained] = {}
    for path, layer in adapted_layers(model).items():
        if layer.delta is not None:
            if is_quantized(layer):
                raise UserError(f"{path} is quantized, and full fine-tuning cannot train it.")
            weights[layer.adapted_weight] = Trained(layer.adapted_weight, kept=_adapted_rows(layer))
    return list(weights.values())


def _adapted_rows(layer: AdaptedLayer) -> Callable[[Tensor], Tensor]:
    """Return the function from a layer's gradient to the rows that have an update, such as q and v of a packed one."""
    update = layer.delta
    if not isinstance(update, RowBlocks):
        return lambda gradient: gradient
    rows = [slice(*update.rows[name]) for name in update.blocks()]
    return lambda gradient: torch.cat([layer.swap_layout(gradient)[each] for each in rows])


def passes(trained: Sequence[Trained], samples: int, room: int, kernels: int = 0) -> list[list[Trained]]:
    """Return tensors in groups whose gradients of all samples fit into so many bytes, with so many kernels."""
    largest = max(each.tensor.numel() for each in trained)

    def needs(count: int) -> int:
        return count * (largest * _BYTES + 8 * kernels * count)

    if needs(samples) > room:
        most = bisect_right(range(samples), room, key=needs) - 1
        mend = f"give at most --samples {most:,}" if most > 1 else "free some memory, or give fewer --batches"
        raise UserError(
            f"{samples:,} samples need {byte_size(needs(samples))} for kernels and gradients of a tensor of "
            f"{largest:,} numbers, and half of the free memory is {byte_size(room)}: {mend}."
        )
    whole = left = room - 8 * kernels * samples**2
    groups = [list[Trained]()]
    for each in trained:
        need = samples * each.tensor.numel() * _BYTES
        if need > left:
            groups.append([])
            left = whole
        groups[-1].append(each)
        left -= need
    return groups


def tangent_kernel(
    loss: Callable[[Sample], Tensor], samples: Sequence[Sample], groups: Sequence[Sequence[Trained]]
) -> Tensor:
    """Return the kernel (N, N) of N samples, float64 on the CPU; a kernel that is zero or not finite is an error.

    Each group of tensors takes a pass over the samples. Afterwards, none of the tensors has ``requires_grad``.
    """
    for each in (each for group in groups for each in group):
        each.tensor.requires_grad_(False)
    kernel = torch.zeros(len(samples), len(samples), dtype=torch.float64)
    for group in groups:
        tensors = [each.tensor.requires_grad_(True) for each in group]
        parts = [each.kept(each.tensor.detach()) for each in group]
        held = [part.new_zeros(len(samples), part.numel()) for part in parts]
        for place, sample in enumerate(samples):
            value = loss(sample)
            if value.requires_grad:  # else these tensors have no part in it
                gradients = torch.autograd.grad(value, tensors, materialize_grads=True)
                for rows, each, gradient in zip(held, group, gradients, strict=True):
                    rows[place] = each.kept(gradient).flatten()
        for each, rows in zip(group, held, strict=True):
            each.tensor.requires_grad_(False)
            for columns in rows.split(max(1, _NUMBERS // len(samples)), 1):  # type: ignore[no-untyped-call]
                kernel += each.factor * gram(columns).cpu()
    if not 0 < float(kernel.norm()) < math.inf:
        raise UserError("the gradients of the samples are zero or not finite at the start. Leave it out.")
    return kernel


def alignment(one: Tensor, other: Tensor) -> float:
    """Return <K, L> / (||K|| ||L||) of two kernels (N, N): 1 if they differ by scale only."""
    return float((one * other).sum() / (one.norm() * other.norm()))


def align(
    model: nn.Module, loss: Callable[[Sample], Tensor], samples: Iterable[Sample], size: int, batches: int, room: int
) -> tuple[int, list[float]]:
    """Compare a method at its start with full fine-tuning of the same layers, which starts at the same outputs.

    Args:
        model: Model in eval mode with a method that was not trained. Updates that a weight can contain are merged
            afterwards.
        loss: Function from a sample to its loss, a scalar.
        samples: Samples of all batches.
        size: Samples per batch.
        batches: Number of batches.
        room: Bytes for gradients and kernels. If they do not fit, an error is raised before any sample is read.

    Returns:
        The count of numbers that the method trains, and the alignment in each batch.
    """
    trained = trained_tensors(model)
    kernels = batches + 2  # each batch's, full fine-tuning's and a product
    weights = layer_weights(model) if report_of(model).adapter.freezes else trained  # full fine-tuning itself
    full, own = (passes(each, size, room, kernels) for each in (weights, trained))  # first the larger tensors
    every = list(samples)
    groups = [every[first : first + size] for first in range(0, len(every), size)]
    ours = [tangent_kernel(loss, group, own) for group in groups]
    merge(model, strict=False)  # DoRA, for one, has other gradients of the frozen weight than of the effective one
    values = [alignment(one, tangent_kernel(loss, group, full)) for one, group in zip(ours, groups, strict=True)]
    return sum(each.tensor.numel() for each in trained), values


def kernel_figure(rows: Sequence[Mapping[str, Any]], about: str) -> Figure:
    """Plot the alignment of rows of the table against their parameters, with the spread over batches as bars."""
    figure = new_figure(7.5, 4.6, "Alignment with full fine-tuning at the start")
    axes = figure.subplots()
    for row, color in zip(rows, colors([row["method"] for row in rows]).values(), strict=True):
        place = row["parameters"], row["alignment"], row["spread"]
        axes.errorbar(*place, fmt="o", capsize=3, color=color, label=for_figure(row["method"]))
    axes.set(xscale="log", xlabel="trained numbers", ylabel="alignment of the tangent kernels")
    axes.grid(alpha=0.3)
    legend(figure, axes, 3)
    footnote(figure, f"{about}; bars: standard deviation over batches")
    return figure
