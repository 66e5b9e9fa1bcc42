"""Checks of what a model put out."""

from torch import Tensor

from randlora_pl.utils.errors import UserError


def check_numbers(outputs: Tensor, source: object) -> None:
    """Refuse outputs that are not finite: no probability follows from them.

    Args:
        outputs: Probabilities, scores or losses.
        source: The adapter, for the message.

    Raises:
        UserError: One is infinite, or not a number.
    """
    if not outputs.isfinite().all():
        raise UserError(
            f"{source}: the outputs of the model are not finite, so that nothing follows from them. The weights or "
            "alpha of the adapter are too large: copy it again, or train it with a lower --model.learning_rate."
        )
