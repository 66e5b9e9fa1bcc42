"""Checks of what a model put out."""

from torch import Tensor

from randlora_pl.utils.errors import UserError


def check_numbers(outputs: Tensor, source: object) -> None:
    """Refuse probabilities, scores or losses of an adapter that are infinite or not a number."""
    if not outputs.isfinite().all():
        raise UserError(
            f"{source}: the outputs of the model are not finite, so predictions are meaningless. The weights or "
            "alpha of the adapter are too large. Copy it again, or train it with a lower --model.learning_rate."
        )
