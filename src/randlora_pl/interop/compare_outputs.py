"""Comparison of two models' outputs on the same inputs."""

from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.tasks.evaluation import check_numbers

_IMAGES = 4


@torch.no_grad()
def outputs(model: nn.Module, size: int) -> list[Tensor]:
    """Return outputs for fixed random images, and for random tokens if the model has a text tower.

    Args:
        model: Model of open_clip or timm.
        size: Height and width of the images in pixels.
    """
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


LOST = 0.1
"""Largest fraction of an adapter's change of the outputs that a conversion may lose."""


ROUNDING = 1e-6
"""Changes below this fraction of the largest output count as float32 rounding."""


def change(tuned: list[Tensor], plain: list[Tensor]) -> float:
    """Return the largest absolute change that an adapter makes to the base model's outputs."""
    return max(float((one.float() - two.float()).abs().max()) for one, two in zip(tuned, plain, strict=True))


def lost(found: list[Tensor], expected: list[Tensor], plain: list[Tensor]) -> float:
    """Return the largest fraction of an adapter's change of the outputs that is lost or replaced.

    Relative to the outputs, the loss of a small update would look like rounding.

    Args:
        found: Outputs of the written model.
        expected: Outputs of the adapted model.
        plain: Outputs of the base model.

    Returns:
        Maximum over all outputs; 0 if the adapter's change is within rounding.
    """
    parts = [
        change([one], [two]) / changed
        for one, two, base in zip(found, expected, plain, strict=True)
        if (changed := change([two], [base])) > ROUNDING * float(two.abs().max())
    ]
    return max(parts, default=0.0)


_TOKENS = 24


@torch.no_grad()
def logits(model: nn.Module) -> list[Tensor]:
    """Return the model's logits for fixed random tokens: (2, tokens, vocabulary), or (2, classes)."""
    config: Any = model.config
    ids = torch.randint(0, int(config.vocab_size), (2, _TOKENS), generator=torch.Generator().manual_seed(0))
    return [model(input_ids=ids).logits.float()]
