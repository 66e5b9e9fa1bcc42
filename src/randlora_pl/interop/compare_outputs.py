"""Comparison of two models' outputs on the same inputs."""

from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.tasks.losses import check_numbers
from randlora_pl.utils.errors import UserError

_IMAGES, _TOKENS = 4, 24

TOLERANCE = 1e-4
"""Largest accepted difference of outputs, relative to the largest output."""

LOST = 0.1
"""Largest fraction of an adapter's change of the outputs that a conversion may lose."""

ROUNDING = 1e-6
"""Changes below this fraction of the largest output count as float32 rounding."""


@torch.no_grad()
def outputs(model: nn.Module, size: int) -> list[Tensor]:
    """Return outputs for ``size`` x ``size`` random images, and for tokens if there is a text tower; both are fixed."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_IMAGES, 3, size, size, generator=generator).to(next(model.parameters()).dtype)
    whole: Any = model
    if not hasattr(model, "encode_text"):
        return [model(images)]
    length = int(getattr(whole, "context_length", None) or 77)
    tokens = torch.randint(1, 1000, (_IMAGES, length), generator=generator)
    return [whole.encode_image(images), whole.encode_text(tokens)]


def difference(found: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """Return the largest relative difference (to each output's largest expected value) and the largest absolute one.

    Both are infinite if ``found`` has a non-finite value.

    Raises:
        UserError: ``expected`` has a non-finite value.
    """
    relative = absolute = 0.0
    for one, two in zip(found, expected, strict=True):
        check_numbers(two, "the adapter")
        gap = float((one.float() - two.float()).abs().max())
        if not gap < float("inf"):  # also NaN
            return float("inf"), float("inf")
        absolute = max(absolute, gap)
        relative = max(relative, gap / max(float(two.abs().max()), torch.finfo(torch.float32).tiny))
    return relative, absolute


def change(tuned: list[Tensor], plain: list[Tensor]) -> float:
    """Return the largest absolute change that an adapter makes to the base model's outputs."""
    return max(float((one.float() - two.float()).abs().max()) for one, two in zip(tuned, plain, strict=True))


@torch.no_grad()
def logits(model: nn.Module) -> list[Tensor]:
    """Return the model's logits for fixed random tokens: (2, tokens, vocabulary), or (2, classes)."""
    config: Any = model.config
    ids = torch.randint(0, int(config.vocab_size), (2, _TOKENS), generator=torch.Generator().manual_seed(0))
    return [model(input_ids=ids).logits.float()]


def check_written(
    found: list[Tensor], expected: list[Tensor], plain: list[Tensor], what: str, hint: str = "Please"
) -> float:
    """Return the largest absolute difference of a written model's outputs, named ``what`` in messages.

    Raises:
        UserError: The difference is more than rounding, or the adapter's change would be lost.
    """
    relative, absolute = difference(found, expected)
    if relative > TOLERANCE:
        raise UserError(
            f"the {what} differ from the adapted one's by {relative:.1e} of the largest, more than {TOLERANCE:.0e}: "
            f"nothing was written. {hint} report this with the adapter's configuration."
        )
    # Relative to the outputs, the loss of a small update would look like rounding.
    lost = [
        change([one], [two]) / changed
        for one, two, base in zip(found, expected, plain, strict=True)
        if (changed := change([two], [base])) > ROUNDING * float(two.abs().max())
    ]
    if (fraction := max(lost, default=0.0)) > LOST:
        raise UserError(
            f"the adapter changes the {what} by {change(expected, plain):.1e} only, and {fraction:.0%} of that would "
            "be lost in rounding: nothing was written. Keep the adapter, or train for longer."
        )
    return absolute
