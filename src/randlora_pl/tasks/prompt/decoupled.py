"""Second heads beside the similarities, and DePT: a linear probe on shifted features (arXiv 2309.07439)."""

from abc import abstractmethod
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.adapters.described import Described
from randlora_pl.tasks.images import SecondHead
from randlora_pl.tasks.prompt.features import PromptedClip
from randlora_pl.utils import rng
from randlora_pl.utils.options import Fraction, Positive


class SecondHeadOptions(Described):
    """Options of a second head.

    Attributes:
        why_not_linear: Why no linear head has the logits of both heads.
    """

    why_not_linear: ClassVar[str]
    rate_factor: float = 1.0
    """Learning rate of the second head, as a multiple of the prompts'."""

    @abstractmethod
    def build(self, task: PromptedClip, features: int) -> SecondHead:
        """Return the second head for the classes of a task, whose features have this width."""


class DePT(SecondHeadOptions):
    """Decoupled prompt tuning: what only the known classes need goes into features of its own.

    Features of images and of texts, not normalized, are scaled and shifted channel by channel, and one linear probe
    classifies both. Its loss has the share ``weight`` of the whole. Known classes are predicted from both heads'
    logits, ``(1 - weight) similarities + weight probe``; other classes from the similarities alone. It adds
    4 e + C (e + 1) numbers.

    Examples:
        >>> task = PromptTask("tiny", prompts=MaPLe(depth=2), head=DePT())
    """

    why_not_linear = "DePT adds the logits of two heads, which no library does"

    weight: Annotated[float, Fraction] = 0.7
    """Share of the second head."""
    rate_factor: Annotated[float, Positive] = 6.5
    """Learning rate of the second head, as a multiple of the prompts'."""

    def build(self, task: PromptedClip, features: int) -> "Decoupled":
        """Return the second head for the classes of a task, whose features have this width."""
        return Decoupled(self.weight, features, len(task.own_classes), task.seed)


class Affine(nn.Module):
    """Scale and shift of each channel (e,), the identity at first."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """Return features (n, e), scaled and shifted."""
        return self.scale * x.float() + self.shift


class Decoupled(SecondHead):
    """The second head of `DePT`."""

    unit_features = False

    def __init__(self, weight: float, features: int, classes: int, seed: int) -> None:
        super().__init__()
        self.weight, self.share = weight, 1 - weight
        self.image, self.text = Affine(features), Affine(features)
        with rng.seeded(int(rng.words(seed, "prompts.probe", torch.tensor(0)))):
            self.probe = nn.Linear(features, classes)

    def _logits(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.probe(features)
            return logits

    def losses(self, losses: Tensor, images: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
        """Return the losses (b,) of both heads: the probe sees each image, and the text of its class."""
        of_images = F.cross_entropy(self._logits(self.image(images)), labels, reduction="none")
        of_texts = F.cross_entropy(self._logits(self.text(texts[labels])), labels, reduction="none")
        return (1 - self.weight) * losses + self.weight * (of_images + of_texts) / 2

    def mixed(self, similarities: Tensor, images: Tensor) -> Tensor:
        """Return the logits (b, C) of both heads for images (b, e), not normalized."""
        return (1 - self.weight) * similarities + self.weight * self._logits(self.image(images))

    def classifier(self, head: Tensor) -> nn.Module:
        """Return similarities and the probe as one module on features that are not normalized."""
        return _Folded(self, head)


class _Folded(nn.Module):
    """The heads of `Decoupled` for a prediction: the probe is one linear layer on image features."""

    head: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, second: Decoupled, head: Tensor) -> None:
        super().__init__()
        self.share, probe, image = second.weight, second.probe, second.image
        bias = probe.bias + probe.weight @ image.shift
        for name, value in (("head", head), ("weight", probe.weight * image.scale), ("bias", bias)):
            self.register_buffer(name, value.detach().clone())

    def forward(self, features: Tensor) -> Tensor:
        near, own = F.linear(F.normalize(features, dim=-1), self.head), F.linear(features, self.weight, self.bias)
        return (1 - self.share) * near + self.share * own
