"""Speed gain from encoding each caption of a batch once: steps of the vision-language task both ways."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.adapters import RandLoRA, inject
from randlora_pl.lab.bench.problems import library_of
from randlora_pl.lab.bench.steps import Case, Precision
from randlora_pl.tasks.losses import caption_losses, normalize, similarities
from randlora_pl.utils.errors import UserError

BASES = {"unique": "each", "text-unique": "text-each"}
"""The case that each is compared with."""


class Captions:
    """A CLIP model with RandLoRA in both towers, random weights, images and captions.

    Captions are random words of full length: their content changes no cost.

    Args:
        model: A name of open_clip, or ``tiny``.
        classes: Captions that differ.

    Raises:
        UserError: open_clip does not know the model.
    """

    def __init__(
        self,
        model: str = "ViT-B-32",
        batch_size: int = 128,
        classes: int = 10,
        precision: Precision = "32",
        device: str = "cpu",
    ) -> None:
        from randlora_pl.models.clip import load_clip

        if library_of(model) != "open_clip":
            raise UserError(f"--model {model} knows no captions; give a model of open_clip")
        clip = load_clip(model, "random")
        if not isinstance(getattr(clip.model, "positional_embedding", None), Tensor):
            raise UserError(f"--model {model} has a text tower of another kind; measure a plain CLIP such as ViT-B-32")
        self.device, self.precision, self.model = torch.device(device), precision, clip.model
        inject(self.model, RandLoRA())
        generator = torch.Generator().manual_seed(0)
        size = clip.image.size
        images = torch.randn(batch_size, 3, size, size, generator=generator)
        words = int(self.model.vocab_size)  # type: ignore[arg-type]
        tokens = torch.randint(1, words - 1, (classes, int(self.model.context_length)), generator=generator)  # type: ignore[arg-type]
        tokens[:, -1] = words - 1  # the end of the text has the largest number
        labels = torch.arange(batch_size) % classes
        self.images, self.tokens, self.labels = (tensor.to(self.device) for tensor in (images, tokens, labels))
        self.present, self.counts = torch.unique(self.labels, return_counts=True)

    def texts(self, model: nn.Module, unique: bool) -> Tensor:
        """Return the features of the batch's captions: of each class once, or of each image."""
        tokens = self.tokens[self.present if unique else self.labels]
        return normalize(model.encode_text(tokens))  # type: ignore[operator]

    def loss(self, model: nn.Module, unique: bool) -> Tensor:
        """Image-to-text cross-entropy over the captions of the batch, the same number both ways."""
        texts = self.texts(model, unique)
        images = normalize(model.encode_image(self.images))  # type: ignore[operator]
        logits = model.logit_scale.exp() * similarities(images, texts)  # type: ignore[operator]
        if unique:
            return caption_losses(logits, self.labels, self.present, self.counts).mean()
        return F.cross_entropy(logits, torch.arange(len(logits), device=self.device))

    def cases(self) -> list[Case]:
        """Whole steps, and the text tower alone, forward and backward, both ways."""

        def case(name: str, label: str, loss: Callable[[nn.Module], Tensor], whole: bool) -> Case:
            shared = {id(one): one for one in self.model.parameters() if not one.requires_grad}
            return Case(
                name, label, copy.deepcopy(self.model, shared), loss, [self.images, self.tokens, self.labels],
                device=self.device, precision=self.precision, optimize=whole,
            )  # fmt: skip

        each, once = f"{len(self.labels)} captions, one an image", f"{len(self.present)} captions, one a class"
        return [
            case("each", f"step: {each}", lambda model: self.loss(model, False), True),
            case("unique", f"step: {once}", lambda model: self.loss(model, True), True),
            case("text-each", f"text tower: {each}", lambda model: self.texts(model, False).sum(), False),
            case("text-unique", f"text tower: {once}", lambda model: self.texts(model, True).sum(), False),
        ]
