"""Vision-only CLIP: the image tower learns against a frozen head of text embeddings (section 5.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from randlora_pl.models import ImageTower, cached_text_head, load_clip
from randlora_pl.models.text import Tokenizer
from randlora_pl.tasks.images import ImageTask, TowerTask, UsedPrompts, normalize, similarities
from randlora_pl.utils.reuse import cached


class TextHeadTask(TowerTask):
    """Fine-tunes the image tower of a CLIP model; class embeddings of averaged prompts are frozen.

    The head is made from the text tower before any adapter exists, and kept on disk under a hash of the
    model, its weights and the prompts.

    Examples:
        >>> task = TextHeadTask("tiny", adapter=LoRA(rank=4))
        >>> make_trainer().fit(AdaptationModule(task), ImageData(dataset="digits", steps=2))
    """

    zero_shot = True
    adopts = "image tower"

    def used_prompts(self, templates: Sequence[str] | None = None) -> UsedPrompts:
        """Return the prompts of the task: its templates, or others if given, averaged."""
        texts = self.templates_for(templates)
        return UsedPrompts(texts, texts)

    def use_typed_prompts(self) -> None:
        """Take typed prompts as any others."""

    def build(self) -> nn.Module:
        """Load the image tower, and make the head; the text tower is not kept."""
        clip = load_clip(self.name, self.pretrained, seed=self.seed)
        self.identity = clip.identity
        device = self.run.device
        tower = ImageTower(clip.model)
        del clip.model.visual
        prompts = self.used_prompts().evaluation

        def make() -> Tensor:
            model = clip.model.to(device)  # a thousand classes with eighty prompts want the accelerator
            head = cached_text_head(model, clip.tokenizer, self.classnames, prompts, device, clip.identity)
            scale: Tensor = model.logit_scale.detach().exp()  # type: ignore[operator]
            return (scale * head).cpu()

        key = (clip.identity, tuple(self.classnames), tuple(prompts), str(device))
        head = cached("head", key, make)
        self.head: Tensor
        self.register_buffer("head", head.clone(), persistent=False)
        return tower

    def build_on(self, other: ImageTask) -> None:
        """Make an empty head of the other's width."""
        head = torch.zeros(len(self.classnames), other.head_weight().shape[1])
        self.register_buffer("head", head, persistent=False)

    def class_logits(self, images: Tensor) -> Tensor:
        """Return scaled similarities with the class embeddings, (b, classes)."""
        return similarities(normalize(self.noted(self.model(images))), self.head)

    def text_model(self) -> tuple[nn.Module, Tokenizer]:
        """Return the frozen model whose text tower encoded the prompts, and its tokenizer."""
        clip = load_clip(self.name, self.pretrained, seed=self.seed)
        return clip.model, clip.tokenizer

    def head_tensors(self) -> dict[str, Tensor]:
        """Return the scaled class embeddings: a prediction needs no text tower."""
        return {"head": self.head}
