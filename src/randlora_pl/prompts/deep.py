"""Learned tokens in the first blocks of both towers: IVLP, VPT-deep (the visual half alone) and MaPLe."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from randlora_pl.models.prompted import image_blocks, image_width, text_tower
from randlora_pl.prompts.base import PromptLearner, Prompts, Tokenizer, drawn
from randlora_pl.prompts.coop import ContextPrompts
from randlora_pl.utils import rng
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
        prompts = _DeepPrompts(model, tokenizer, self, seed, self.visual)
        if self.visual:
            shape, device = (self.vision_length, image_width(model.visual)), prompts.tokens.device
            prompts.images.extend(drawn(shape, seed, f"prompts.vision.{block}", device) for block in range(self.depth))
        return prompts


class _DeepPrompts(ContextPrompts):
    """Learned tokens of the first blocks of the text tower, and of the image tower, which are empty at first.

    Raises:
        UserError: A tower that has learned tokens has fewer blocks, or takes none.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, options: "DeepPrompts | MaPLe", seed: int, images: bool
    ) -> None:
        super().__init__(model, tokenizer, options.words, options.length, seed, fills=False)
        blocks = {"text": len(text_tower(model).transformer.resblocks)} if options.length else {}
        blocks |= {"image": len(image_blocks(model.visual))} if images else {}
        if options.depth > (least := min(blocks.values())):
            towers = " and ".join(f"the {name} tower has {count} blocks" for name, count in blocks.items())
            raise UserError(f"depth is {options.depth}: {towers}. Give {least} or less (--model.prompts.depth).")
        self.tokens.requires_grad_(options.length > 0)
        shape, device = self.tokens.shape, self.tokens.device
        later = range(1, options.depth if options.length else 1)
        self.texts = nn.ParameterList([drawn(shape, seed, f"prompts.text.{block}", device) for block in later])
        self.images = nn.ParameterList()

    def deep(self) -> list[Tensor]:
        return list(self.texts)

    def vision(self) -> list[Tensor]:
        return list(self.images)


class MaPLe(PromptLearner):
    """Multi-modal prompts: the image tower's tokens are linear functions of the text tower's, block by block.

    Each of the first J blocks has n learned tokens P_i for texts, and ``Q_i = P_i W_i^T + b_i`` for images. The
    functions hold nearly all that trains: 3,545,856 of 3,555,072 numbers for CLIP-ViT-B. A prediction needs P and Q.

    Examples:
        >>> task = PromptTask("tiny", prompts=MaPLe(depth=2))
    """

    length: Count = 2
    """Learned tokens n of each block."""
    depth: Count = 9
    """Blocks J with their own tokens, in both towers."""
    words: str = "a photo of a"
    """Words that the first tokens start from. Words beyond ``length`` stay as they are."""
    coupling: Literal["linear", "low_rank", "none"] = "linear"
    """``linear``; ``low_rank`` with W_i of rank ``rank``, ours; or ``none``, which is `DeepPrompts`."""
    rank: Count = 16
    """Rank of ``low_rank``."""
    equal_start: bool = True
    """Start the functions of all later blocks from one value, as the released code does."""

    visual = True

    def build(self, model: nn.Module, tokenizer: Tokenizer, classnames: Sequence[str], seed: int) -> Prompts:
        """Return the learned tokens and the functions that couple them."""
        if self.coupling == "none":
            return DeepPrompts(length=self.length, vision_length=self.length, depth=self.depth, words=self.words).build(
                model, tokenizer, classnames, seed
            )
        prompts = _CoupledPrompts(model, tokenizer, self, seed, True)
        prompts.projections = nn.ModuleList()
        own, width, device = prompts.tokens.shape[1], image_width(model.visual), prompts.tokens.device
        for block in range(self.depth):  # with PyTorch's first values of a linear layer
            part = min(block, 1) if self.equal_start else block
            with rng.seeded(int(rng.words(seed, "prompts.projection", torch.tensor(part)))):
                if self.coupling == "linear":
                    prompts.projections.append(nn.Linear(own, width, device=device))
                else:
                    layers = nn.Linear(own, self.rank, bias=False), nn.Linear(self.rank, width, bias=False)
                    prompts.projections.append(nn.Sequential(*layers).to(device))
        return prompts


class _CoupledPrompts(_DeepPrompts):
    projections: nn.ModuleList

    def vision(self) -> list[Tensor]:
        with torch.autocast(self.tokens.device.type, enabled=False):
            each = [self.tokens, *self.texts]
            return [function(tokens) for function, tokens in zip(self.projections, each, strict=True)]
