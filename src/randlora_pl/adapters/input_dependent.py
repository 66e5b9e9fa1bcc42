"""Refusal of operations that need an update as a matrix, for methods whose update depends on the layer's input."""

from typing import Protocol

from randlora_pl.utils.errors import UserError


class Method(Protocol):
    """The part of an `Adapter` that is needed here."""

    fixed: bool

    def method(self) -> str:
        """Return the name."""


def no_matrix(name: str) -> UserError:
    """Return the error for an operation that needs a matrix of an input-dependent update.

    Args:
        name: Method, or layer or file with the method in brackets.
    """
    return UserError(
        f"{name}: the update depends on the input, so no weight contains it and it cannot be merged, compared or "
        "converted. Use the adapter itself: predict, serve and, for images, adapter export --to torch run it unmerged."
    )


def check_fixed(adapter: Method, name: object = "") -> None:
    """Check that a method's updates are matrices.

    Args:
        adapter: Method.
        name: File or layer for the message.

    Raises:
        UserError: The updates depend on the input.
    """
    if not adapter.fixed:
        raise no_matrix(f"{name} ({adapter.method()})" if name else adapter.method())
