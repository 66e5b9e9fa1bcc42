"""The losses over classes, text features that all parts of an optimizer step share, and a check of outputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.utils.errors import UserError


def class_losses(logits: Tensor, batch: Mapping[str, Any], smoothing: float) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy over all classes, and how far the likeliest class is right.

    Args:
        logits: (b, classes).
        batch: ``label`` (b,) int64; for blended images ``target`` (b, classes) with the fraction of each class.
        smoothing: Fraction of each target that is spread evenly over all classes.

    Returns:
        Loss (b,), and the target's fraction of the likeliest class (b,).
    """
    guesses, target = logits.argmax(1), batch.get("target")
    right = guesses == batch["label"] if target is None else target.gather(1, guesses[:, None])[:, 0]
    wanted = batch["label"] if target is None else target
    return nn.functional.cross_entropy(logits.float(), wanted, reduction="none", label_smoothing=smoothing), right


def set_losses(logits: Tensor, target: Tensor, smoothing: float = 0.0, reduction: str = "none") -> Tensor:
    """Compute the binary cross-entropy of each image, the mean over the classes: an image may have any number of them.

    Args:
        logits: (b, classes).
        target: (b, classes), 1 for each class of an image and 0 for the others.
        smoothing: Fraction of each target that is spread evenly over yes and no.
        reduction: ``none``, or ``sum`` for the sum over the images.

    Returns:
        (b,) losses, or their sum.
    """
    wanted = torch.lerp(target.float(), torch.full_like(target, 0.5, dtype=torch.float32), smoothing)
    losses = nn.functional.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none").mean(1)
    return losses.sum() if reduction == "sum" else losses


class StepFeatures:
    """Text features that all micro-batches of an optimizer step share, encoded once.

    Every micro-batch but the last works on a detached copy that collects the gradient of the features;
    the last one sends the sum of all of it through the text tower in one backward pass. So the text
    tower runs once per optimizer step, and the gradient equals the gradient of the undivided batch.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.leaf = features.detach().requires_grad_(features.requires_grad)

    def use(self, last: bool) -> Tensor:
        """Return the features for one micro-batch: with their graph for the last one, without it before."""
        return self.features if last else self.leaf

    def pending(self, factor: float | Tensor) -> Tensor:
        """Return a term of value zero with the gradient that earlier micro-batches collected.

        Args:
            factor: Factor of a loss before its backward pass (gradient scaling, division by the number of
                micro-batches), which the collected gradient contains already.
        """
        if self.leaf.grad is None or not self.features.requires_grad:
            return self.features.new_zeros(())
        carried = (self.features * (self.leaf.grad / factor)).sum()
        return carried - carried.detach()


def check_numbers(outputs: Tensor, source: object) -> None:
    """Refuse probabilities, scores or losses of an adapter that are infinite or not a number."""
    if not outputs.isfinite().all():
        raise UserError(
            f"{source}: the outputs of the model are not finite, so predictions are meaningless. The weights or "
            "alpha of the adapter are too large. Copy it again, or train it with a lower --model.learning_rate."
        )
