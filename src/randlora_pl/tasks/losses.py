"""The vision-language loss over the captions of an optimizer step, what it takes to split the step, and a check."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.utils.errors import UserError


def caption_losses(logits: Tensor, labels: Tensor, classes: Tensor, counts: Tensor) -> Tensor:
    """Compute the image-to-text cross-entropy over the captions of an optimizer step, each unique caption once.

    The protocol compares every image with every caption of the batch, and equal captions are equal
    columns. Their sum is one column with the log of its count added, so with n_c captions of
    class c the loss is ``log sum_c n_c exp(z_c) - z_y``, value and gradient alike (protocol 2.3).

    Args:
        logits: (b, u) similarities of b images and the u unique captions of the step.
        labels: (b,) classes of the images.
        classes: (u,) sorted classes of the captions.
        counts: (u,) number of each in the step.

    Returns:
        (b,) loss of each image.
    """
    logits = logits.float()
    target = torch.searchsorted(classes, labels)
    own = logits.gather(1, target[:, None])[:, 0]
    return torch.logsumexp(logits + counts.float().log(), dim=1) - own


def sigmoid_losses(logits: Tensor, labels: Tensor, classes: Tensor, counts: Tensor) -> Tensor:
    """Compute SigLIP's sum over the pairs of an image with the captions of an optimizer step, each unique caption once.

    A pair is positive if the caption's class is the image's. With n_c captions of class c the loss is
    ``sum_c n_c log(1 + exp(-+ z_c))``, where the sign is minus for the own class (Zhai et al., arXiv 2303.15343).

    Its arguments are described at `caption_losses`; the logits contain the model's bias.
    """
    logits = logits.float()
    signed = torch.where(classes == labels[:, None], logits, -logits)
    return -(counts * nn.functional.logsigmoid(signed)).sum(1)


def logit_bias(model: nn.Module) -> Tensor | None:
    """Return the bias of a model's logits, which models that were pretrained with the sigmoid loss have; else None."""
    return getattr(model, "logit_bias", None)


def pair_losses(model: nn.Module, logits: Tensor, labels: Tensor, classes: Tensor, counts: Tensor) -> Tensor:
    """Return `sigmoid_losses` if a model was pretrained with them, else `caption_losses`; logits are without bias."""
    bias = logit_bias(model)
    if bias is None:
        return caption_losses(logits, labels, classes, counts)
    return sigmoid_losses(logits + bias, labels, classes, counts)


def pair_floor(model: nn.Module, labels: Tensor, classes: Tensor, counts: Tensor) -> Tensor | float:
    """Return the infimum of `pair_losses` over all logits, (b,) or 0.

    No logits can separate equal captions: it is ``log n_y``, the loss of an image that matches its own caption alone.
    """
    if logit_bias(model) is not None:
        return 0.0
    return counts[torch.searchsorted(classes, labels)].clamp(min=1).float().log()


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


def padded_captions(classes: Tensor, counts: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return captions and counts in one of few shapes, for compiled code: a multiple of 16, or ``most``.

    The last class is repeated with count 0, so that classes stay sorted, and losses, gradients and the likeliest class
    stay the same: its column adds exp(-inf) to each sum.

    Args:
        classes: (u,) sorted classes of the captions.
        counts: (u,) number of each in the step.
        most: Number of all classes.
    """
    extra = max(0, min(-(-len(classes) // 16) * 16, most) - len(classes))
    return torch.cat([classes, classes[-1:].expand(extra)]), torch.cat([counts, counts.new_zeros(extra)])


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


def similarities(images: Tensor, texts: Tensor) -> Tensor:
    """Compute the (b, u) products of (b, e) and (u, e) features in float32, also under autocast.

    Rounded to bfloat16, logits around 25 would be multiples of 1/8.
    """
    with torch.autocast(images.device.type, enabled=False):
        return images.float() @ texts.float().T


def normalize(features: Tensor) -> Tensor:
    """Scale rows to unit length, in float32 so that half precision does not round the similarities."""
    return nn.functional.normalize(features.float(), dim=-1)


def check_numbers(outputs: Tensor, source: object) -> None:
    """Refuse probabilities, scores or losses of an adapter that are infinite or not a number."""
    if not outputs.isfinite().all():
        raise UserError(
            f"{source}: the outputs of the model are not finite, so predictions are meaningless. The weights or "
            "alpha of the adapter are too large. Copy it again, or train it with a lower --model.learning_rate."
        )
