"""Base classes of all prompt learners: `PromptLearner` (options) and `Prompts` (learned tokens of one model)."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from randlora_pl.adapters.described import Described
from randlora_pl.models.prompted import TextRows, encode_rows, text_tower
from randlora_pl.utils import rng

Tokenizer = Callable[..., Tensor]


class PromptLearner(Described):
    """Options of a prompt learner, independent of a model and its classes.

    Attributes:
        visual: True if it has tokens in the image tower.
        per_image: True if the context of a text depends on the image.
        learns: True if it has something to train.
        starts_pretrained: True if it begins as a prompt of words, so that a test before the training is one of the
            pretrained model.
        class_specific: True if each class has tokens of its own, so that it cannot name other classes.
    """

    visual: ClassVar[bool] = False
    per_image: ClassVar[bool] = False
    learns: ClassVar[bool] = True
    starts_pretrained: ClassVar[bool] = False
    class_specific = False

    @abstractmethod
    def build(self, model: nn.Module, tokenizer: Tokenizer, classnames: Sequence[str], seed: int) -> "Prompts":
        """Return the learned tokens for a CLIP model without an adapter.

        Args:
            model: Model of open_clip; it is not changed.
            tokenizer: Its tokenizer.
            classnames: C names, of which class-specific tokens need the number.
            seed: Seed of random tokens, which depend on nothing else.

        Raises:
            UserError: The options do not fit the model.
        """


class Prompts(nn.Module):
    """Learned tokens of a model: float32 parameters, and the texts of classes with them.

    Subclasses override what they learn; without overrides a model's own texts and images stay as they are.

    Attributes:
        classes: Token rows of the texts of classes; None before `take_classes`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.classes: TextRows | None = None

    def take_classes(
        self, model: nn.Module, classnames: Sequence[str], chunk_tokens: int, device: torch.device
    ) -> None:
        """Tokenize the texts of classes, for `encode_texts`.

        Args:
            model: Model of open_clip.
            classnames: C names.
            chunk_tokens: Tokens of the texts that are alive at a time (see `TextRows`).
            device: Device of the token rows.

        Raises:
            UserError: A name is too long, or tokens of other classes were learned.
        """
        self.classes = self.rows(classnames, chunk_tokens).to(device)

    def encode_texts(self, model: nn.Module, shift: Tensor | None = None, again: bool = False) -> Tensor:
        """Return the features (C, e) of the classes' texts, not normalized.

        Args:
            model: Model of open_clip.
            shift: (d,), added to the context.
            again: Compute a single chunk again in the backward pass, too.
        """
        assert self.classes is not None
        context = self.context()
        if shift is not None and context is not None:
            context = context + shift
        return encode_rows(text_tower(model), self.classes, context, self.deep(), again)

    def rows(self, classnames: Sequence[str], chunk_tokens: int) -> TextRows:
        """Return the token rows of classes (see `TextRows`).

        Raises:
            UserError: A name is too long, or tokens of other classes were learned.
        """
        raise NotImplementedError

    def context(self) -> Tensor | None:
        """Return the learned tokens in the texts, (M, d) or one set for each class (C, M, d)."""
        return None

    def shifts(self, images: Tensor) -> Tensor | None:
        """Return what unit image features (B, e) add to the context, (B, d), or None if nothing."""
        return None

    def deep(self) -> list[Tensor]:
        """Return tokens (n, d) that replace states of the text tower before its second block and later ones."""
        return []

    def vision(self) -> list[Tensor]:
        """Return tokens (n, d) after an image's patches, and those that replace them before later blocks."""
        return []


def drawn(shape: Sequence[int], seed: int, name: str, device: torch.device | str = "cpu") -> Tensor:
    """Return random tokens in float32, a function of seed and name alone."""
    if torch.device(device).type == "meta":
        return torch.empty(*shape, device=device)
    with rng.seeded(int(rng.words(seed, name, torch.tensor(0)))):
        return torch.empty(*shape).normal_(std=0.02).to(device)  # as in all of the papers
