"""Outputs of two models on the same inputs, and how far they differ."""

from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.tasks.evaluation import check_numbers

_IMAGES = 4


@torch.no_grad()
def outputs(model: nn.Module, size: int) -> list[Tensor]:
    """What a model makes of random images, the same at every call, and of random tokens where it reads text.

    Args:
        model: open_clip's or timm's.
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
    """The largest difference of two lists of outputs relative to the largest expected value of each, and absolute.

    Infinite where one found is not finite.

    Raises:
        UserError: One expected is not finite.
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
"""The largest part of what an adapter changes in the outputs that may be lost on the way."""


ROUNDING = 1e-6
"""Changes below this part of the largest output cannot be told from rounding in float32."""


def change(tuned: list[Tensor], plain: list[Tensor]) -> float:
    """The largest difference that an adapter makes to the outputs of its base model; 0 where it makes none."""
    return max(float((one.float() - two.float()).abs().max()) for one, two in zip(tuned, plain, strict=True))


def lost(found: list[Tensor], expected: list[Tensor], plain: list[Tensor]) -> float:
    """Which part of an adapter's change of the outputs is missing, or is another one.

    Relative to the outputs themselves a small update is nothing, so that its loss would pass for rounding.

    Args:
        found: Outputs of what was written.
        expected: Outputs of the adapted model.
        plain: Outputs of the base model.

    Returns:
        The largest part of all outputs; 0 where an adapter changes nothing that can be told from rounding.
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
    """What a model makes of fixed random tokens: (2, tokens, vocabulary), or (2, classes)."""
    config: Any = model.config
    ids = torch.randint(0, int(config.vocab_size), (2, _TOKENS), generator=torch.Generator().manual_seed(0))
    return [model(input_ids=ids).logits.float()]
