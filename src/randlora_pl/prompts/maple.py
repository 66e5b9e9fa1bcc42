"""MaPLe: prompts of the image tower that are functions of the text tower's (Khattak et al., arXiv 2210.03117)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from randlora_pl.models.prompted import image_width
from randlora_pl.prompts.base import Context, PromptLearner, Prompts, Tokenizer
from randlora_pl.prompts.coop import ContextPrompts
from randlora_pl.prompts.deep import DeepPrompts, check_depth, deep_tokens
from randlora_pl.utils import rng
from randlora_pl.utils.options import Count


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
        context = Context(model, tokenizer, self.words, self.length, seed, fills=False)
        check_depth(model, self.depth)
        texts = deep_tokens(context, self.depth, seed)
        functions = [self._function(context, image_width(model.visual), seed, block) for block in range(self.depth)]
        return _CoupledPrompts(context, texts, functions)

    def _function(self, context: Context, width: int, seed: int, block: int) -> nn.Module:
        """Return the function of one block, with PyTorch's first values of a linear layer."""
        part = min(block, 1) if self.equal_start else block
        own, device = context.start.shape[1], context.start.device
        with rng.seeded(int(rng.words(seed, "prompts.projection", torch.tensor(part)))):
            if self.coupling == "linear":
                return nn.Linear(own, width, device=device)
            layers = nn.Linear(own, self.rank, bias=False), nn.Linear(self.rank, width, bias=False)
            return nn.Sequential(*layers).to(device)


class _CoupledPrompts(ContextPrompts):
    def __init__(self, context: Context, texts: list[Tensor], functions: list[nn.Module]) -> None:
        super().__init__(context)
        self.texts, self.projections = nn.ParameterList(texts), nn.ModuleList(functions)

    def deep(self) -> list[Tensor]:
        return list(self.texts)

    def vision(self) -> list[Tensor]:
        with torch.autocast(self.tokens.device.type, enabled=False):
            each = [self.tokens, *self.texts]
            return [function(tokens) for function, tokens in zip(self.projections, each, strict=True)]
