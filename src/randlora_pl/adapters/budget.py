"""Parameter budgets: counts of trainable parameters, and matching one method to another's count."""

from inspect import signature

import torch
from torch import nn

from randlora_pl.adapters import methods
from randlora_pl.adapters.base import Adapter, WeightShape
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.text.formatting import byte_size

_SMALL = 1 << 27
"""Values of bases and trainable parameters (0.5 GB in float32) that are always allowed."""


def count_parameters(adapter: Adapter, shapes: list[WeightShape]) -> int:
    """Return the trainable parameters of an adapter on these weights."""
    return sum(adapter.count(shape) for shape in shapes)


def _has_size(kind: type[Adapter]) -> bool:
    """Return True if a method has the option that ``match`` chooses."""
    return kind.size_option in signature(kind).parameters


def parse_budget(text: str, shapes: list[WeightShape], model: nn.Module) -> int:
    """Return the trainable parameters of ``method:number`` (such as ``lora:32``) or ``full`` on these weights.

    Raises:
        UserError: The text is not a known method and a positive number.
    """
    name, _, number = text.lower().partition(":")
    if name == "full" and not number:
        return sum(parameter.numel() for parameter in model.parameters())
    kind = next((getattr(methods, method) for method in methods.__all__ if method.lower() == name), None)
    if kind is None or not _has_size(kind) or not number.isdecimal() or int(number) == 0:
        raise UserError(f"match is {text!r}. Set a method and a number (lora:32, randlora:6, nola:1024), or full.")
    return count_parameters(kind(**{kind.size_option: int(number)}), shapes)


def match_budget(adapter: Adapter, shapes: list[WeightShape], model: nn.Module) -> tuple[Adapter, list[str]]:
    """Return the adapter with the rank (NoLA: number of bases) whose trainable parameters are closest to its ``match``.

    Args:
        adapter: Adapter; without ``match`` it is returned unchanged.
        shapes: Weights to adapt.
        model: Model, for the count of full fine-tuning.

    Returns:
        The adapter, and notes with both counts.

    Raises:
        UserError: The budget is not valid, or the method has no number to choose.
    """
    if adapter.match is None:
        return adapter, []
    budget = parse_budget(adapter.match, shapes, model)
    inner = getattr(adapter, "inner", adapter)
    option = inner.size_option
    if not _has_size(type(inner)):
        raise UserError(f"{inner.method()} has no {option} to match to {adapter.match}. Leave out its option match.")

    def count(number: int) -> int:
        return count_parameters(adapter.replace(**{option: number, "match": None}), shapes)

    if isinstance(inner, methods.LoRA | methods.RandLoRA):
        # RandLoRA's count decreases with the rank, but not monotonically (d/r is rounded up), so all ranks are tried.
        candidates = range(1, min(shape.small for shape in shapes) + 1)
    else:
        # The counts of the other methods are linear in the number.
        nearest = 1 + (budget - count(1)) // (count(2) - count(1))
        candidates = range(max(1, nearest), max(1, nearest) + 2)
    best = min(candidates, key=lambda number: abs(count(number) - budget))
    note = f"matched to {adapter.match}: {option} {best} has {count(best):,} parameters, {adapter.match} {budget:,}"
    return adapter.replace(**{option: best, "match": None}), [f"{note} ({100 * (count(best) / budget - 1):+.1f} %)"]


def check_size(adapter: Adapter, shapes: list[WeightShape], total: int) -> None:
    """Raise an error if an adapter is much larger than its model, before allocating memory.

    Args:
        adapter: Method and its options.
        shapes: Adapted weights.
        total: Parameters of the model.

    Raises:
        UserError: Bases and trainable parameters together have more than four times the values of the model.
    """
    size, most = count_parameters(adapter, shapes), max(_SMALL, 4 * total)
    if size <= most and (bases := adapter.bases(shapes, torch.device("meta"))) is not None:
        size += sum(tensor.numel() for tensor in bases.buffers())
    if size > most:
        raise UserError(
            f"{adapter.method()} would have {size:,} values ({byte_size(4 * size)}) in bases and parameters, "
            f"the model has {total:,}. Lower --model.adapter.num_bases or --model.adapter.rank."
        )
