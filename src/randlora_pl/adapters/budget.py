"""Parameter budgets: counting a method on a set of weights, and matching one method to another's count."""

from collections.abc import Callable

from torch import nn

from randlora_pl.adapters.base import Adapter, WeightShape
from randlora_pl.adapters.lora import LoRA
from randlora_pl.adapters.nola import NoLA
from randlora_pl.adapters.randlora import RandLoRA
from randlora_pl.adapters.vera import VeRA
from randlora_pl.errors import UserError

_METHODS: dict[str, Callable[..., Adapter]] = {"randlora": RandLoRA, "lora": LoRA, "vera": VeRA, "nola": NoLA}


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
    if name not in _METHODS or not number.isdigit() or int(number) == 0:
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
    # Only LoRA and RandLoRA are bounded by the smaller side; the others may need more than it.
    top = min(shape.small for shape in shapes) if isinstance(inner, LoRA | RandLoRA) else 1 << 20
    counts: dict[int, int] = {}

    def count(number: int) -> int:
        if number not in counts:
            counts[number] = count_parameters(adapter.replace(**{option: number, "match": None}), shapes)
        return counts[number]

    # The count is monotonic in the number, so bisect to the crossing and compare its two sides.
    rising = count(top) >= count(1)
    low, high = 1, top
    while low < high:
        middle = (low + high) // 2
        if (count(middle) >= budget) == rising:
            high = middle
        else:
            low = middle + 1
    best = min((number for number in (low - 1, low) if number >= 1), key=lambda number: abs(count(number) - budget))
    note = f"matched to {adapter.match}: {option} {best} has {count(best):,} parameters, {adapter.match} {budget:,}"
    return adapter.replace(**{option: best, "match": None}), [f"{note} ({100 * (count(best) / budget - 1):+.1f} %)"]
