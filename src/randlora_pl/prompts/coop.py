"""CoOp and CoCoOp: learned words before, around or after the name of a class (Zhou et al., arXiv 2109.01134)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.models.prompted import Position, TextRows, embed_dim, padded, text_tower, word_ids
from randlora_pl.prompts.base import PromptLearner, Prompts, Tokenizer, drawn
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Count


class CoOp(PromptLearner):
    """Context optimization: M learned tokens in the place of "a photo of a".

    The prompt of class c is ``[start] v_1 .. v_M name_c . [end]``. M d numbers train, 2,048 for CLIP-ViT-B with four
    tokens; class-specific ones C M d. After training, class features are constant, so prediction costs nothing more.

    Examples:
        >>> task = PromptTask("tiny", prompts=CoOp(length=4, words=None))
    """

    length: Count | None = None
    """Number of learned tokens M; None for as many as ``words`` are."""
    words: str | None = "a photo of a"
    """Words that the tokens start from; None for random tokens with standard deviation 0.02."""
    position: Position = "end"
    """Place of the class name: at the ``end``, in the ``middle`` of the context, or at the ``front``."""
    class_specific: bool = False
    """Learn a context for each class. It names no other classes then."""

    @property
    def starts_pretrained(self) -> bool:  # type: ignore[override]
        """True if the context starts from words."""
        return self.words is not None

    def build(self, model: nn.Module, tokenizer: Tokenizer, classnames: Sequence[str], seed: int) -> Prompts:
        """Return the learned context."""
        prompts = ContextPrompts(model, tokenizer, self.words, self.length, seed, position=self.position)
        if self.class_specific:
            prompts.tokens = nn.Parameter(prompts.tokens.detach().expand(len(classnames), -1, -1).clone())
        return prompts


class ContextPrompts(Prompts):
    """A learned context of texts, which starts from words or random tokens.

    Args:
        model: Model of open_clip.
        tokenizer: Its tokenizer.
        words: Words that the context starts from; None for random tokens.
        length: Number of learned tokens, the first of the context; None for all of the words.
        seed: Seed of random tokens.
        fills: True if the learned tokens must be all of the words.
        position: See `CoOp`.

    Attributes:
        tokens: The learned tokens, (M, d), or (C, M, d) for each class.

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
        position: Position = "end",
    ) -> None:
        super().__init__()
        tower: Any = text_tower(model)
        positions: Tensor = tower.positional_embedding
        if words is None and length is None:
            raise UserError("random tokens need a number: give --model.prompts.length, or words.")
        self.position: Position = position
        self._tokenizer, self._room = tokenizer, len(positions)
        ids = word_ids(tokenizer, "x" if words is None else words)[1:-1]
        self._words = ids[:1] * (length or 0) if words is None else ids
        learned = len(ids) if length is None else length
        if learned > len(self._words) or (fills and learned != len(self._words)):
            other = "Leave length out, or set words to null for random tokens" if fills else "Give more words"
            raise UserError(
                f"the words {words!r} are {len(ids)} tokens for this model, length is {length}. {other} "
                "(--model.prompts.words)."
            )
        if words is None:
            start = drawn((learned, positions.shape[1]), seed, "prompts.context", positions.device)
        else:
            first = torch.tensor(ids[:learned], dtype=torch.int64, device=positions.device)
            start = tower.token_embedding(first).detach().float().clone()
        self.tokens = nn.Parameter(start)

    def rows(self, classnames: Sequence[str], chunk_tokens: int) -> TextRows:
        """Return rows of start token, context, name, full stop and end token; the first of the context are learned."""
        if self.tokens.dim() == 3 and len(classnames) != len(self.tokens):
            raise UserError(
                f"class-specific prompts were learned for {len(self.tokens)} classes, these are {len(classnames)}. "
                "Train with --model.prompts.class_specific false to name other classes."
            )
        learned = [number if number < self.tokens.shape[-2] else -1 for number in range(len(self._words))]
        pairs = list(zip(self._words, learned, strict=True))
        before = {"end": len(pairs), "middle": len(pairs) // 2, "front": 0}[self.position]
        rows, slots = [], []
        for name in classnames:
            stop: list[int] = []
            if self.position == "end":
                start, *own, end = word_ids(self._tokenizer, f"{name}.")
            else:
                (start, *own, end), stop = word_ids(self._tokenizer, name), word_ids(self._tokenizer, ".")[1:-1]
            row = [(start, -1), *pairs[:before], *((word, -1) for word in own), *pairs[before:]]
            row += [(word, -1) for word in [*stop, end]]
            rows.append([token for token, _ in row])
            slots.append([number for _, number in row])
        return padded(rows, slots, classnames, self._room, chunk_tokens)

    def context(self) -> Tensor | None:
        """Return the learned tokens, None if there are none."""
        return self.tokens if self.tokens.shape[-2] else None


class CoCoOp(PromptLearner):
    """Conditional context optimization: a network adds the same vector, a function of the image, to all tokens.

    The network is ``W_2 relu(W_1 f + b_1) + b_2`` of the unit image feature f (e), with e / 16 hidden units: 35,360
    numbers for CLIP-ViT-B with four tokens. Every image is compared with its own C texts, in training and afterwards,
    so each costs C passes of the text tower.

    Examples:
        >>> task = PromptTask("tiny", prompts=CoCoOp(length=4, words=None))
    """

    length: Count | None = None
    """Number of learned tokens; None for as many as ``words`` are."""
    words: str | None = "a photo of a"
    """Words that the tokens start from; None for random tokens."""

    per_image = True

    def build(self, model: nn.Module, tokenizer: Tokenizer, classnames: Sequence[str], seed: int) -> Prompts:
        """Return the learned context and its network."""
        prompts = _ConditionalPrompts(model, tokenizer, self.words, self.length, seed)
        features, (width, device) = embed_dim(model), (prompts.tokens.shape[1], prompts.tokens.device)
        with rng.seeded(int(rng.words(seed, "prompts.network", torch.tensor(0)))):
            first = nn.Linear(features, features // 16, device=device)
            prompts.network = nn.Sequential(first, nn.ReLU(), nn.Linear(features // 16, width, device=device))
        return prompts


class _ConditionalPrompts(ContextPrompts):
    network: nn.Sequential

    def shifts(self, images: Tensor) -> Tensor | None:
        shifts: Tensor = self.network(images)
        return shifts
