"""Parameter budgets: counts of trainable parameters, and matching one method to another's count."""

from bisect import bisect_left
from functools import cache
from inspect import signature

from torch import nn

from randlora_pl.adapters import methods
from randlora_pl.adapters.base import Adapter
from randlora_pl.adapters.weights import WeightShape
from randlora_pl.utils.errors import UserError

_REFUSED = 1 << 62
"""Count of a size that a method refuses."""


def count_parameters(adapter: Adapter, shapes: list[WeightShape]) -> int:
    """Return the trainable parameters of an adapter on these weights."""
    return sum(adapter.count(shape) for shape in shapes)


def parse_budget(text: str, shapes: list[WeightShape], model: nn.Module) -> int:
    """Return the trainable parameters of ``method:number`` (such as ``lora:32``) or ``full`` on these weights.

    Raises:
        UserError: The text is not a known method with a size and a number that it may have.
    """
    name, _, number = text.lower().partition(":")
    if name == "full" and not number:
        return sum(parameter.numel() for parameter in model.parameters())
    kind = next((getattr(methods, method) for method in methods.__all__ if method.lower() == name), None)
    sized = kind is not None and kind.size_option in signature(kind).parameters
    if kind is None or not sized or not number.isdecimal() or int(number) < kind().sizes(shapes)[0]:
        raise UserError(f"match is {text!r}. Set a method and a number (lora:32, randlora:6, nola:1024), or full.")
    return count_parameters(kind(**{kind.size_option: int(number)}), shapes)


def wished(adapter: Adapter) -> Adapter | None:
    """Return the adapter, or the one inside it, whose option ``match`` is set; None if there is none.

    Raises:
        UserError: Several have one.
    """
    found: list[Adapter] = [each for each in adapter.leaves() if each.match is not None]
    if len(found) > 1:
        raise UserError(
            f"{' and '.join(each.method() for each in found)} have match. Keep one, and set the other sizes."
        )
    return found[0] if found else None


def match_budget(adapter: Adapter, shapes: list[WeightShape], model: nn.Module) -> tuple[Adapter, list[str]]:
    """Return the adapter with the size whose trainable parameters are closest to its ``match``.

    The size is the option that `Adapter.size_option` names, such as the rank, of the one adapter inside that has
    ``match``. The count is of the adapter as a whole.

    Args:
        adapter: Adapter; without ``match`` it is returned unchanged.
        shapes: Weights to adapt.
        model: Model, for the count of full fine-tuning.

    Returns:
        The adapter, and notes with both counts.

    Raises:
        UserError: The budget is not valid, the count of every size differs from it by more than half of it, or the
            method has no size to choose.
    """
    leaf = wished(adapter)
    if leaf is None or leaf.match is None:
        return adapter, []
    match, option, budget = leaf.match, leaf.size_option, parse_budget(leaf.match, shapes, model)
    if option not in signature(type(leaf)).parameters:
        raise UserError(f"{leaf.method()} has no {option} to match to {match}. Leave out its option match.")

    def sized(number: int) -> Adapter:
        chosen: Adapter = adapter.exchanged(leaf, leaf.replace(**{option: number, "match": None}))
        return chosen

    @cache
    def count(number: int) -> int:
        try:
            return count_parameters(sized(number), shapes)
        except UserError:  # too large for a weight
            return _REFUSED

    sizes = leaf.sizes(shapes)
    if len(sizes) > 10_000:  # too many to try one by one
        above = bisect_left(sizes, budget, key=count)
        sizes = sizes[max(0, above - 1) : above + 1]
    # Not every count rises with the size: RandLoRA's falls, but d/r is rounded up. So all of a few sizes are tried.
    best, *others = sorted(sizes, key=lambda number: abs(count(number) - budget))
    count_parameters(sized(best), shapes)  # raises if no size fits
    others = [number for number in others if count(number) < _REFUSED]
    if abs(count(best) - budget) > budget / 2:
        near = " and ".join(f"{number} ({count(number):,})" for number in sorted([best, *others[:1]]))
        near += " are nearest" if others else " is nearest"
        inside = "" if leaf is adapter else f" in {adapter.method()}"
        mend = f"Set {option}{inside and f' of {leaf.method()}'} instead of match"
        mend += ", or make the other parts smaller." if inside and count(best) > budget else "."
        raise UserError(
            f"no {option} of {leaf.method()}{inside} comes near {match} ({budget:,} parameters): {near}. {mend}"
        )
    note = f"matched to {match}: {option} {best} has {count(best):,} parameters, {match} {budget:,}"
    return sized(best), [f"{note} ({100 * (count(best) / budget - 1):+.1f} %)"]
