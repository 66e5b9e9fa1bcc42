"""CoOp: learned words before, around or after the name of a class (Zhou et al., arXiv 2109.01134)."""

from collections.abc import Sequence

from torch import Tensor, nn

from randlora_pl.models.prompted import Position, TextRows, learned_rows
from randlora_pl.prompts.base import Context, PromptLearner, Prompts, Tokenizer
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
