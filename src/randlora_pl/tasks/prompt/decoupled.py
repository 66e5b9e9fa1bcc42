"""DePT: a linear probe on shifted features beside the similarities (Zhang et al., arXiv 2309.07439)."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.adapters.described import Described
from randlora_pl.utils import rng
from randlora_pl.utils.options import Fraction, Positive


class DePT(Described):
    """Decoupled prompt tuning: what only the known classes need goes into features of its own.

    Features of images and of texts, not normalized, are scaled and shifted channel by channel, and one linear probe
    classifies both. Its loss has the share ``weight`` of the whole. Known classes are predicted from both heads'
    logits, ``(1 - weight) similarities + weight probe``; other classes from the similarities alone. It adds
    4 e + C (e + 1) numbers.

    Examples:
        >>> task = PromptTask("tiny", prompts=MaPLe(depth=2), head=DePT())
    """

    weight: Annotated[float, Fraction] = 0.7
    """Share of the second head."""
    rate_factor: Annotated[float, Positive] = 6.5
    """Learning rate of the second head, as a multiple of the prompts'."""

    def build(self, features: int, classes: int, seed: int) -> "Decoupled":
        """Return the second head for features of a width and a number of classes."""
        return Decoupled(self.weight, features, classes, seed)


class Affine(nn.Module):
    """Scale and shift of each channel (e,), the identity at first."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """Return features (n, e), scaled and shifted."""
        return self.scale * x.float() + self.shift


class Decoupled(nn.Module):
    """The second head of `DePT`."""

    def __init__(self, weight: float, features: int, classes: int, seed: int) -> None:
        super().__init__()
        self.weight, self.image, self.text = weight, Affine(features), Affine(features)
        with rng.seeded(int(rng.words(seed, "prompts.probe", torch.tensor(0)))):
            self.probe = nn.Linear(features, classes)

    def _logits(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            found: Tensor = self.probe(features)
            return found

    def losses(self, losses: Tensor, images: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
        """Return the losses (b,) of both heads: the probe sees each image, and the text of its class.

        Args:
            losses: (b,) losses of the similarities.
            images: (b, e) features, not normalized.
            texts: (C, e) features, not normalized.
            labels: (b,) classes.
        """
        of_images = F.cross_entropy(self._logits(self.image(images)), labels, reduction="none")
        of_texts = F.cross_entropy(self._logits(self.text(texts[labels])), labels, reduction="none")
        return (1 - self.weight) * losses + self.weight * (of_images + of_texts) / 2

    def mixed(self, similarities: Tensor, images: Tensor) -> Tensor:
        """Return the logits (b, C) of both heads for images (b, e), not normalized."""
        return (1 - self.weight) * similarities + self.weight * self._logits(self.image(images))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return weight (C, e) and bias (C,) of one linear layer on image features, for a prediction."""
        weight = self.probe.weight * self.image.scale
        return weight, self.probe.bias + self.probe.weight @ self.image.shift
