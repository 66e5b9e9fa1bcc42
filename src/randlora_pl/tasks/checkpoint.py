"""Checks of a checkpoint against the run that resumes from it."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from randlora_pl.utils.errors import UserError


def check_adapter(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse the checkpoint of another adapter.

    Args:
        theirs: ``Adapter.identity()`` of the checkpoint.
        ours: Value of this run.

    Raises:
        UserError: Names the first option that differs, with both values.
    """
    pairs = [("method", theirs["method"], ours["method"])]
    pairs += [(name, theirs["options"].get(name), value) for name, value in ours["options"].items()]
    for name, there, here in pairs:
        if there != here:
            raise UserError(
                f"adapter.{name} is {there} in the checkpoint and {here} in this run; "
                "leave the option out, or start a new run."
            )


def check_tensors(given: Mapping[str, Tensor], own: Mapping[str, Tensor], needed: Collection[str], what: str) -> None:
    """Refuse tensors that do not fit.

    Args:
        given: What was read.
        own: What there is to fill.
        needed: Names of ``own`` that must be given.
        what: Where the tensors come from, for the message.

    Raises:
        UserError: One is missing, unknown, or of another shape.
    """
    missing, unknown = sorted(set(needed) - given.keys()), sorted(given.keys() - own.keys())
    if missing or unknown:
        raise UserError(f"{what} does not fit: missing {missing[:3]}, unexpected {unknown[:3]}.")
    for name, value in given.items():
        if value.shape != own[name].shape:
            there, here = tuple(value.shape), tuple(own[name].shape)
            raise UserError(f"{what} does not fit: {name} has shape {there} there and {here} here.")
