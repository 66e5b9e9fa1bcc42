"""The base of a second head next to CLIP's similarities."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from randlora_pl.tasks.objective import Objective


class SecondHead(nn.Module, ABC):
    """A second head, which is mixed with the similarities; known classes are predicted from both.

    Attributes:
        share: Share of the similarities' loss in the whole.
        eps: Epsilon of AdamW for its parameters; None for the optimizer's own.
        unit_features: True if `classifier` takes features of unit length.
    """

    share = 1.0
    eps: float | None = None
    unit_features = True

    def start(self, task: Objective, encode: Callable[[Tensor], Tensor], compare: Callable[[Tensor], Tensor]) -> None:
        """Prepare for a training run.

        Args:
            task: The task that trains.
            encode: Function that returns the features of images.
            compare: Function that returns the scaled similarities of features and the classes' texts.
        """

    def training_logits(self, similarities: Tensor, images: Tensor) -> Tensor:
        """Return the logits (b, C) whose cross-entropy trains, for images (b, e), not normalized."""
        return similarities

    def losses(self, losses: Tensor, images: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
        """Return the losses (b,) of both heads, from the similarities' losses (b,), for classes ``labels`` (b,).

        The features of images (b, e) and texts (C, e) are not normalized.
        """
        return losses

    @abstractmethod
    def mixed(self, similarities: Tensor, images: Tensor) -> Tensor:
        """Return the logits (b, C) of both heads for images (b, e), not normalized."""

    @abstractmethod
    def classifier(self, head: Tensor) -> nn.Module:
        """Return a module from image features (n, e) to the logits of both heads, for a weight (C, e) of the first."""

    def chosen(self) -> dict[str, Tensor]:
        """Return the tensors that were chosen before the training, by name."""
        return {}
