"""CoCoOp: a learned context that each image shifts (Zhou et al., arXiv 2203.05557)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from randlora_pl.models.prompted import embed_dim
from randlora_pl.prompts.base import Context, PromptLearner, Prompts, Tokenizer
from randlora_pl.prompts.coop import ContextPrompts
from randlora_pl.utils import rng
from randlora_pl.utils.options import Count


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
