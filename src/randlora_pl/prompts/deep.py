"""Learned tokens in both towers, in the first blocks of each: IVLP, and the visual half alone, VPT-deep."""

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor, nn

from randlora_pl.models.prompted import image_blocks, image_width, text_tower
from randlora_pl.prompts.base import Context, PromptLearner, Prompts, Tokenizer, drawn
from randlora_pl.prompts.coop import ContextPrompts
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Count, NotNegative


class DeepPrompts(PromptLearner):
    """Independent prompts of both towers (the baseline IVLP of MaPLe and PromptSRC; Jia et al., arXiv 2203.12119).

    Each of the first ``depth`` blocks of a tower has its own tokens: in texts at positions 1 to n, in images after the
    patches. They replace the states of the block before. J (n d_t + n_v d_v) numbers train, 46,080 for CLIP-ViT-B with
    four tokens and nine blocks.

    Examples:
        >>> task = PromptTask("tiny", prompts=DeepPrompts(length=2, vision_length=2, depth=2))
    """

    length: Annotated[int, NotNegative] = 4
    """Learned tokens n of each text, 0 for none."""
    vision_length: Annotated[int, NotNegative] = 4
    """Learned tokens n_v of each image, 0 for none."""
    depth: Count = 9
    """Blocks J that have their own tokens, in both towers."""
    words: str = "a photo of a"
    """Words that a text's first tokens start from. Words beyond ``length`` stay as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length == self.vision_length == 0:
            raise UserError("length and vision_length are 0: nothing is learned. Use --model.prompts Fixed.")

    @property
    def visual(self) -> bool:  # type: ignore[override]
        """True if images have learned tokens."""
        return self.vision_length > 0

    def build(self, model: nn.Module, tokenizer: Tokenizer, classnames: Sequence[str], seed: int) -> Prompts:
        """Return the learned tokens of both towers."""
        context = Context(model, tokenizer, self.words, self.length, seed, fills=False)
        check_depth(model, self.depth, texts=self.length > 0, images=self.visual)
        vision: list[Tensor] = []
        if self.visual:
            shape = (self.vision_length, image_width(model.visual))
            device = context.start.device
            vision = [drawn(shape, seed, f"prompts.vision.{block}", device) for block in range(self.depth)]
        return _DeepPrompts(context, deep_tokens(context, self.depth, seed), vision)


def check_depth(model: nn.Module, depth: int, texts: bool = True, images: bool = True) -> None:
    """Refuse learned tokens for more blocks than a tower has.

    Raises:
        UserError: A tower that has learned tokens has fewer blocks, or takes none.
    """
    blocks = {"text": len(text_tower(model).transformer.resblocks)} if texts else {}
    blocks |= {"image": len(image_blocks(model.visual))} if images else {}
    if depth > (least := min(blocks.values())):
        towers = " and ".join(f"the {name} tower has {count} blocks" for name, count in blocks.items())
        raise UserError(f"depth is {depth}: {towers}. Give {least} or less (--model.prompts.depth).")


def deep_tokens(context: Context, depth: int, seed: int) -> list[Tensor]:
    """Return the first values of the tokens of later blocks of the text tower, none without learned tokens."""
    if not len(context.start):
        return []
    shape, device = context.start.shape, context.start.device
    return [drawn(shape, seed, f"prompts.text.{block}", device) for block in range(1, depth)]


class _DeepPrompts(ContextPrompts):
    def __init__(self, context: Context, texts: list[Tensor], vision: list[Tensor]) -> None:
        super().__init__(context)
        self.tokens.requires_grad_(len(self.tokens) > 0)
        self.texts, self.images = nn.ParameterList(texts), nn.ParameterList(vision)

    def deep(self) -> list[Tensor]:
        return list(self.texts)

    def vision(self) -> list[Tensor]:
        return list(self.images)
