"""Refusal of operations that need a trait of a method which this one does not have."""

from typing import Literal, Protocol

from randlora_pl.utils.errors import UserError

Trait = Literal["fixed", "keeps_base"]

_REASONS: dict[Trait, tuple[str, str]] = {
    "fixed": (
        "the update depends on the input and no weight contains it",
        "Use the adapter itself: predict, serve and, for images, adapter export --to torch run it unmerged.",
    ),
    "keeps_base": (
        "the method trains the model's own weights and no base model is left",
        "Build the base model again.",
    ),
}


class Method(Protocol):
    """The part of an `Adapter` that is needed here."""

    fixed: bool
    keeps_base: bool

    def method(self) -> str:
        """Return the name."""


def lacks(trait: Trait, operation: str, name: str) -> UserError:
    """Return the error for an operation that needs a trait.

    Args:
        trait: Trait that the method does not have.
        operation: The operation as a noun, such as ``the export to ONNX``.
        name: Method, or layer or file with the method in brackets.
    """
    reason, hint = _REASONS[trait]
    return UserError(f"{name}: {reason}, so {operation} is not possible. {hint}")


def require(adapter: Method, trait: Trait, operation: str, source: object = "") -> None:
    """Check that a method has a trait that an operation needs.

    Args:
        adapter: Method.
        trait: Trait that the operation needs.
        operation: The operation as a noun.
        source: File or layer for the message.

    Raises:
        UserError: The method does not have it.
    """
    if not getattr(adapter, trait):
        raise lacks(trait, operation, f"{source} ({adapter.method()})" if source else adapter.method())
