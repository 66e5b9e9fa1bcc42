"""Base classes of all prompt learners: `PromptLearner` (options) and `Prompts` (learned tokens of one model)."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from randlora_pl.adapters.described import Described
from randlora_pl.models.prompted import TextRows, encode_rows, image_features, text_tower, word_ids
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError

INITIAL_STD = 0.02
"""Standard deviation of random initial tokens, in all of the papers."""

Tokenizer = Callable[..., Tensor]


class PromptLearner(Described):
    """Options of a prompt learner, independent of a model and its classes.

    Attributes:
        visual: True if it has tokens in the image tower.
        per_image: True if the context of a text depends on the image.
        learns: True if it has something to train.
        class_specific: True if each class has tokens of its own, so that it cannot name other classes.
    """

    visual: ClassVar[bool] = False
    per_image: ClassVar[bool] = False
    learns: ClassVar[bool] = True
    class_specific = False

    @property
    def starts_pretrained(self) -> bool:
        """True if it begins as a prompt of words, so that a test before the training is one of the pretrained model."""
        return False

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

    def encode_images(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the features (b, e) of images, not normalized."""
        tower: Any = model.visual
        return image_features(tower, images, self.vision())

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

    def trains_texts(self) -> bool:
        """Return True if texts have learned tokens."""
        return self.context() is not None or bool(self.deep())


class Context:
    """Words or random tokens that a learned context of texts starts from.

    Args:
        model: Model of open_clip.
        tokenizer: Its tokenizer.
        words: Words that the context starts from; None for random tokens.
        length: Number of learned tokens; None for all of the words.
        seed: Seed of random tokens.
        fills: True if the learned tokens must be all of the words.

    Attributes:
        ids: Token ids of the context.
        start: First value of the learned tokens, (M, d) float32; they are the first of the context.
        room: Positions of the text tower.

    Raises:
        UserError: The length is missing, or does not fit the words.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        words: str | None,
        length: int | None,
        seed: int,
        fills: bool = True,
    ) -> None:
        tower: Any = text_tower(model)
        positions: Tensor = tower.positional_embedding
        if words is None and length is None:
            raise UserError("random tokens need a number: give --model.prompts.length, or words.")
        self.tokenizer, self.room = tokenizer, len(positions)
        self.ids = word_ids(tokenizer, words) if words is not None else word_ids(tokenizer, "x")[:1] * (length or 0)
        learned = len(self.ids) if length is None else length
        if learned > len(self.ids) or (fills and learned != len(self.ids)):
            other = "Leave length out, or set words to null for random tokens" if fills else "Give more words"
            raise UserError(
                f"the words {words!r} are {len(self.ids)} tokens for this model, length is {length}. {other} "
                "(--model.prompts.words)."
            )
        if words is None:
            self.start = drawn((learned, positions.shape[1]), seed, "prompts.context", positions.device)
        else:
            ids = torch.tensor(self.ids[:learned], dtype=torch.int64, device=positions.device)
            self.start = tower.token_embedding(ids).detach().float().clone()


def drawn(shape: Sequence[int], seed: int, name: str, device: torch.device | str = "cpu") -> Tensor:
    """Return random tokens in float32, a function of seed and name alone."""
    if torch.device(device).type == "meta":
        return torch.empty(*shape, device=device)
    with rng.seeded(int(rng.words(seed, name, torch.tensor(0)))):
        return torch.empty(*shape).normal_(std=INITIAL_STD).to(device)
