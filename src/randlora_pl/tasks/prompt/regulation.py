"""PromptSRC: learned prompts that stay near the pretrained model's features (Khattak et al., arXiv 2307.06948)."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.adapters import disabled
from randlora_pl.adapters.described import Described
from randlora_pl.data.catalog import IMAGENET_TEMPLATES
from randlora_pl.models.text import TextRows, class_prompts, encode_rows, image_features, is_causal, text_tower
from randlora_pl.tasks.losses import normalize, similarities
from randlora_pl.utils.options import NotNegative, between


class SelfRegulation(Described):
    """Self-regulation: features and logits of the prompts stay near the pretrained model's.

    With units p of the prompted and z of the frozen model, a step's loss gets ``text`` times the mean of |g_p - g_z|
    over classes and channels, ``image`` times the mean of |f_p - f_z| over images and channels, and ``logits`` times
    KL(z || p) of the class probabilities, divided by C as the released code does.

    Examples:
        >>> task = PromptTask("tiny", prompts=DeepPrompts(depth=2), regulation=SelfRegulation(templates=4))
    """

    text: Annotated[float, NotNegative] = 25.0
    """Factor of the class features' term."""
    image: Annotated[float, NotNegative] = 10.0
    """Factor of the image features' term."""
    logits: Annotated[float, NotNegative] = 1.0
    """Factor of the divergence."""
    templates: Annotated[int, between(1, 80)] = 60
    """How many of CLIP's templates for ImageNet the frozen class features are means of."""

    def build(self, model: nn.Module, tokenizer: Callable[..., Tensor], classnames: Sequence[str]) -> "Teacher":
        """Return the pretrained model's class features: units of the means of features that are not normalized."""
        device = next(model.parameters()).device
        with torch.no_grad(), disabled(model):
            sums: Tensor | float = 0.0
            for template in IMAGENET_TEMPLATES[: self.templates]:
                ids = tokenizer(class_prompts(classnames, [template])).to(device)
                if is_causal(model):  # it need not read beyond the ends of the texts
                    features = encode_rows(text_tower(model), TextRows(ids, torch.full_like(ids, -1), ids.argmax(1)))
                else:
                    features = model.encode_text(ids)  # type: ignore[operator]
                sums = sums + features.float()
        assert isinstance(sums, Tensor)
        return Teacher(self, normalize(sums))


class Teacher(nn.Module):
    """The pretrained model's class features (C, e), and the distances to them."""

    texts: Tensor

    def __init__(self, factors: SelfRegulation, texts: Tensor) -> None:
        super().__init__()
        self.factors = factors
        self.register_buffer("texts", texts, persistent=False)

    def text_loss(self, texts: Tensor) -> Tensor:
        """Return the term of the class features (C, e), not normalized."""
        return self.factors.text * (normalize(texts) - self.texts).abs().mean()

    def image_losses(self, model: nn.Module, images: Tensor, features: Tensor, logits: Tensor, scale: Tensor) -> Tensor:
        """Return the terms (b,) of images, whose frozen features the model gives without its adapter and prompts."""
        tower: Any = model.visual
        with torch.no_grad(), disabled(model):
            frozen = normalize(image_features(tower, images))
        wanted = (scale * similarities(frozen, self.texts)).softmax(1)
        near = (normalize(features) - frozen).abs().mean(1)
        divergence = F.kl_div(logits.float().log_softmax(1), wanted, reduction="none").sum(1) / logits.shape[1]
        return self.factors.image * near + self.factors.logits * divergence
