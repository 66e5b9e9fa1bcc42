"""CoOp and CoCoOp: learned words before, around or after the name of a class (Zhou et al., arXiv 2109.01134)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from randlora_pl.models.prompted import Position, TextRows, embed_dim, learned_rows
from randlora_pl.prompts.base import Context, PromptLearner, Prompts, Tokenizer
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
    def starts_pretrained(self) -> bool:
        """True if the context starts from words."""
        return self.words is not None

    def build(self, model: nn.Module, tokenizer: Tokenizer, classnames: Sequence[str], seed: int) -> Prompts:
        """Return the learned context."""
        context = Context(model, tokenizer, self.words, self.length, seed)
        if self.class_specific:
            context.start = context.start.expand(len(classnames), -1, -1).clone()
        return ContextPrompts(context, self.position)


class ContextPrompts(Prompts):
    """A learned context.

    Args:
        context: Its words and first value, (M, d), or (C, M, d) for each class.
        position: See `CoOp`.
    """

    def __init__(self, context: Context, position: Position = "end") -> None:
        super().__init__()
        self._words, self._tokenizer, self._room = context.ids, context.tokenizer, context.room
        self.position: Position = position
        self.tokens = nn.Parameter(context.start)

    def rows(self, classnames: Sequence[str], chunk_tokens: int) -> TextRows:
        """Return rows with the learned tokens in the place of the first words."""
        if self.tokens.dim() == 3 and len(classnames) != len(self.tokens):
            raise UserError(
                f"class-specific prompts were learned for {len(self.tokens)} classes, these are {len(classnames)}. "
                "Train with --model.prompts.class_specific false to name other classes."
            )
        learned = self.tokens.shape[-2]
        return learned_rows(self._tokenizer, classnames, self._words, learned, self._room, self.position, chunk_tokens)

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
        context = Context(model, tokenizer, self.words, self.length, seed)
        return _ConditionalPrompts(context, embed_dim(model), seed)


class _ConditionalPrompts(ContextPrompts):
    def __init__(self, context: Context, features: int, seed: int) -> None:
        super().__init__(context)
        with rng.seeded(int(rng.words(seed, "prompts.network", torch.tensor(0)))):
            hidden, (width, device) = features // 16, (self.tokens.shape[1], self.tokens.device)
            self.network = nn.Sequential(
                nn.Linear(features, hidden, device=device), nn.ReLU(), nn.Linear(hidden, width, device=device)
            )

    def shifts(self, images: Tensor) -> Tensor | None:
        shifts: Tensor = self.network(images)
        return shifts
