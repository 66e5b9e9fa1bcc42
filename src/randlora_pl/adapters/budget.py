"""Parameter budgets: counting a method on a set of weights, and matching one method to another's count."""

from collections.abc import Callable

import torch
from torch import nn

from randlora_pl.adapters.base import Adapter, WeightShape
from randlora_pl.adapters.methods.fixed_rank.lora import LoRA
from randlora_pl.adapters.methods.fixed_rank.nola import NoLA
from randlora_pl.adapters.methods.fixed_rank.vera import VeRA
from randlora_pl.adapters.methods.full_rank.randlora import RandLoRA
from randlora_pl.utils.errors import UserError

_METHODS: dict[str, Callable[..., Adapter]] = {"randlora": RandLoRA, "lora": LoRA, "vera": VeRA, "nola": NoLA}

_SMALL = 1 << 27
"""Values of bases and of what trains, 0.5 GB in float32, that any machine has room for."""


def count_parameters(adapter: Adapter, shapes: list[WeightShape]) -> int:
    """Trainable parameters of an adapter on these weights."""
    return sum(adapter.count(shape) for shape in shapes)


def _number_option(method: str) -> str:
    """The option that sets a method's size."""
    return "num_bases" if method.lower() == "nola" else "rank"


def parse_budget(text: str, shapes: list[WeightShape], model: nn.Module) -> int:
    """The trainable count that ``method:number`` or ``full`` has on these weights, for example ``lora:32``.

    Raises:
        UserError: If the text names no method and positive number.
    """
    name, _, number = text.lower().partition(":")
    if name == "full" and not number:
        return sum(parameter.numel() for parameter in model.parameters())
    if name not in _METHODS or not number.isdecimal() or int(number) == 0:
        raise UserError(f"match is {text!r}: give a method and a number, as lora:32, randlora:6, nola:1024, or full.")
    return count_parameters(_METHODS[name](**{_number_option(name): int(number)}), shapes)


def match_budget(adapter: Adapter, shapes: list[WeightShape], model: nn.Module) -> tuple[Adapter, list[str]]:
    """The adapter with the rank (NoLA: number of bases) whose count is nearest to its ``match``.

    Args:
        adapter: The adapter; without ``match`` it comes back as it is.
        shapes: The weights that it will adapt.
        model: The model, for the count of full fine-tuning.

    Returns:
        The adapter to use and remarks that say both counts.
    """
    if adapter.match is None:
        return adapter, []
    budget = parse_budget(adapter.match, shapes, model)
    inner = getattr(adapter, "inner", adapter)
    option = _number_option(inner.method())

    def count(number: int) -> int:
        return count_parameters(adapter.replace(**{option: number, "match": None}), shapes)

    if isinstance(inner, LoRA | RandLoRA):
        # RandLoRA's count falls with the rank but not steadily (d/r is rounded up), so every rank is tried.
        candidates = range(1, min(shape.small for shape in shapes) + 1)
    else:
        # The counts of the others lie on a line.
        nearest = 1 + (budget - count(1)) // (count(2) - count(1))
        candidates = range(max(1, nearest), max(1, nearest) + 2)
    best = min(candidates, key=lambda number: abs(count(number) - budget))
    note = f"matched to {adapter.match}: {option} {best} has {count(best):,} parameters, {adapter.match} {budget:,}"
    return adapter.replace(**{option: best, "match": None}), [f"{note} ({100 * (count(best) / budget - 1):+.1f} %)"]


def check_size(adapter: Adapter, shapes: list[WeightShape], total: int) -> None:
    """Refuse an adapter that is much larger than its model, before any of it is allocated.

    Args:
        adapter: The method and its options.
        shapes: The adapted weights.
        total: Numbers in the model.

    Raises:
        UserError: Its bases and what trains have more than four times the numbers of the model.
    """
    size, most = count_parameters(adapter, shapes), max(_SMALL, 4 * total)
    if size <= most and (bases := adapter.bases(shapes, torch.device("meta"))) is not None:
        size += sum(tensor.numel() for tensor in bases.buffers())
    if size > most:
        raise UserError(
            f"{adapter.method()} would have {size:,} numbers ({4 * size / 1e9:,.0f} GB) in its bases and what trains, "
            f"the model has {total:,}. Lower --model.adapter.num_bases or --model.adapter.rank."
        )
