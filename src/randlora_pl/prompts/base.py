"""Base classes of all prompt learners: `PromptLearner` (options) and `Prompts` (learned tokens), and fixed words."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from randlora_pl.adapters.described import Described
from randlora_pl.models.prompted import TextRows, encode_rows, is_causal, padded, text_tower, word_ids
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError

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


class Fixed(PromptLearner):
    """A template for each class; nothing is learned in the prompt.

    With LoRA of rank 2 this is CLIP-LoRA (Zanella and Ben Ayed, arXiv 2405.18541): ``--config clip_lora``.

    Examples:
        >>> task = PromptTask("tiny", prompts=Fixed(template="a photo of a {}."), adapter=LoRA(rank=2))
    """

    template: str = "a photo of a {}."
    """Text with ``{}`` for the name of the class."""

    learns = False
    starts_pretrained = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{}" not in self.template:
            raise UserError(f"template is {self.template!r}: it needs {{}} for the name (--model.prompts.template).")

    def build(self, model: nn.Module, tokenizer: Tokenizer, classnames: Sequence[str], seed: int) -> Prompts:
        """Return prompts without learned tokens."""
        return _FixedPrompts(self.template, tokenizer)


class _FixedPrompts(Prompts):
    words: Tensor  # of a tower whose words see later ones

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.template, self._tokenizer = template, tokenizer

    def rows(self, classnames: Sequence[str], chunk_tokens: int) -> TextRows:
        rows = [word_ids(self._tokenizer, self.template.replace("{}", name)) for name in classnames]
        room = self._tokenizer([""]).shape[1]
        return padded(rows, [[-1] * len(row) for row in rows], classnames, room, chunk_tokens)

    def take_classes(
        self, model: nn.Module, classnames: Sequence[str], chunk_tokens: int, device: torch.device
    ) -> None:
        if is_causal(model):
            super().take_classes(model, classnames, chunk_tokens, device)
            return
        prompts = [self.template.replace("{}", name) for name in classnames]
        tokens = self._tokenizer(prompts)
        room = tokens.shape[1]
        padding = self._tokenizer([""], context_length=2 * room).mode().values
        uncut = self._tokenizer(prompts, context_length=2 * room)
        lengths, whole = ((rows != padding).sum(1) for rows in (tokens, uncut))
        if (lengths != whole).any():
            long = classnames[int((whole - lengths).argmax())]
            raise UserError(
                f"the prompt of class {long!r} is longer than the {room} tokens that the text tower has room for. Take "
                "a shorter one (--model.prompts.template) or a shorter name."
            )
        self.register_buffer("words", tokens.to(device), False)
        self._chunk_tokens = chunk_tokens

    def encode_texts(self, model: nn.Module, shift: Tensor | None = None, again: bool = False) -> Tensor:
        if self.classes is not None:
            return super().encode_texts(model, shift, again)
        encode: Any = model.encode_text
        chunks = torch.split(self.words, max(1, self._chunk_tokens // self.words.shape[1]))
        if len(chunks) > 1 and torch.is_grad_enabled():  # as `encode_rows`
            encode = partial(checkpoint, encode, use_reentrant=False)
        return torch.cat([encode(chunk) for chunk in chunks])
