"""The modules of exported programs: encoders of images and texts, and classifiers."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.models.prompted import image_features
from randlora_pl.tasks.prompt.decoupled import Decoupled
from randlora_pl.tasks.prompt.tip import Cache
from randlora_pl.utils.image_spec import ImageSpec


class ImageEncoder(nn.Module):
    """Module from pixels to the features of an image tower, of unit length if ``unit``, as CLIP compares them."""

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, frame: ImageSpec, unit: bool) -> None:
        super().__init__()
        self.tower, self.unit = tower, unit
        self.register_buffer("mean", torch.tensor(frame.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(frame.std).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (n, 3, H, W) in 0..1 to (n, features)."""
        features: Tensor = self.tower((pixels - self.mean) / self.std)
        return F.normalize(features, dim=-1) if self.unit else features


class ExportedClassifier(nn.Module):
    """Module from pixels to logits and probabilities of all classes; ``head`` is (classes, features)."""

    head: Tensor

    def __init__(self, encoder: ImageEncoder, head: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("head", head.detach().clone())

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Map (n, 3, H, W) in 0..1 to (n, classes) logits and probabilities."""
        logits = F.linear(self.encoder(pixels), self.head)
        return logits, logits.softmax(1)


class PromptedTower(nn.Module):
    """Module from normalized images to the features of an image tower with learned tokens, which are constants."""

    def __init__(self, visual: nn.Module, tokens: Sequence[Tensor]) -> None:
        super().__init__()
        self.visual, self.count = visual, len(tokens)
        for number, each in enumerate(tokens):
            self.register_buffer(f"tokens{number}", each.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """Map (n, 3, H, W) to (n, features)."""
        return image_features(self.visual, images, [getattr(self, f"tokens{number}") for number in range(self.count)])


class DecoupledClassifier(ExportedClassifier):
    """`ExportedClassifier` with the second head of `DePT` as a linear layer on features that are not normalized."""

    weight: Tensor
    bias: Tensor

    def __init__(self, encoder: ImageEncoder, head: Tensor, second: Decoupled) -> None:
        super().__init__(encoder, head)
        self.share = second.weight
        weight, bias = second.folded()
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", bias.detach().clone())

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Map (n, 3, H, W) in 0..1 to (n, classes) logits and probabilities."""
        features = self.encoder(pixels)
        near, own = F.linear(F.normalize(features, dim=-1), self.head), F.linear(features, self.weight, self.bias)
        logits = (1 - self.share) * near + self.share * own
        return logits, logits.softmax(1)


class CachedClassifier(ExportedClassifier):
    """`ExportedClassifier` with the cache of `TipAdapter`: two products and an exponential more."""

    def __init__(self, encoder: ImageEncoder, head: Tensor, cache: Cache) -> None:
        super().__init__(encoder, head)
        self.cache = cache

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Map (n, 3, H, W) in 0..1 to (n, classes) logits and probabilities."""
        features = self.encoder(pixels)
        logits = F.linear(features, self.head) + self.cache(features)
        return logits, logits.softmax(1)


class TextEncoder(nn.Module):
    """Module from token ids to text features of unit length."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip: Any = clip

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (n, context length) int64 to (n, features)."""
        return F.normalize(self.clip.encode_text(tokens), dim=-1)


def make_classifier(encoder: ImageEncoder, head: Tensor, second: Decoupled | Cache | None) -> ExportedClassifier:
    """Return the classifier with a second head, if there is one."""
    if isinstance(second, Cache):
        return CachedClassifier(encoder, head, second)
    return ExportedClassifier(encoder, head) if second is None else DecoupledClassifier(encoder, head, second)
