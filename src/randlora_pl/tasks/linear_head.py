"""Pure vision: a backbone and a linear head learn together (section 5.2, DINOv2 and timm models)."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import field
from functools import cached_property
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters.random_bases import Distribution, draw
from randlora_pl.models import ImageTower, clip_image_spec, library_of, load_clip, load_vit, meta_vit, vit_image_spec
from randlora_pl.tasks.images import ImageTask, TowerTask, normalize
from randlora_pl.tasks.optim import parameter_groups
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec
from randlora_pl.utils.options import Positive


class HeadTask(ImageTask):
    """Base of the tasks that fine-tune an image tower with a bias-free linear head, which starts at N(0, 0.01^2).

    A subclass defines `head_outputs`. If it predicts no classes, it defines `output_loss`, `make_metrics` and
    `compared`, too, and declares `measures`, `has_classes` and `answer`.

    Examples:
        >>> class Number(HeadTask):
        ...     has_classes, answer, measures = False, "number", (LOSS,)
        ...     def head_outputs(self):
        ...         return 1
        ...     def make_metrics(self):
        ...         return {}
        ...     def output_loss(self, outputs, labels, reduction="none"):
        ...         return torch.nn.functional.mse_loss(outputs[:, 0], labels.float(), reduction=reduction)
    """

    trained_head = True
    vision_only = True

    name: str = field(default="vit_base_patch14_dinov2.lvd142m", kw_only=False)
    """A model of timm, for example ``vit_base_patch14_dinov2.lvd142m``, or an open_clip architecture, whose image tower
    is used."""
    pretrained: str | None = field(default=None, kw_only=False)
    """``timm`` for the weights of the name, a weights file, a tag of open_clip, or ``random``. Default: the weights of
    the tag in the name."""
    targets: list[str] | None = None
    """Layers to adapt: regular expressions over layer names or the aliases ``qkv q k v kv o fc1 fc2 attn mlp all
    conv``. Default: q/k/v and both MLP matrices of every block. In models without those, every linear layer of the
    blocks, or their convolutions where the blocks have no linear layer."""
    head_learning_rate: Annotated[float, Positive] | None = None
    """Peak learning rate of the head. Default: 1e-3, or 0.02 for a CLIP image tower (its features have unit length)."""
    img_size: int | None = None
    """Height and width of the images in pixels; position embeddings are resized. Default: the model's own, 224 for
    DINOv2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.head_learning_rate = self.head_learning_rate or (2e-2 if self.is_clip else 1e-3)
        self.unit_features = self.is_clip

    @cached_property
    def is_clip(self) -> bool:
        """True if the backbone is an image tower of open_clip, whose features have unit length."""
        return library_of(self.name) == "open_clip"

    @abstractmethod
    def head_outputs(self) -> int:
        """Return the number of outputs of the head."""

    def model_spec(self) -> ImageSpec:
        """Return the preprocessing of the model's images, of the chosen size."""
        if self.is_clip:
            return clip_image_spec(self.name, self.pretrained, self.img_size)
        return vit_image_spec(self.name, self.img_size)

    def on_meta(self) -> tuple[nn.Module, list[str] | None] | None:
        """Return the backbone without values, and the layers to adapt."""
        return super().on_meta() if self.is_clip else (meta_vit(self.name, self.img_size), self.targets)

    def build(self) -> nn.Module:
        """Load the backbone, and make the head for its number of features."""
        backbone: nn.Module
        if self.is_clip:
            clip = load_clip(self.name, self.pretrained, seed=self.seed, force_image_size=self.img_size)
            backbone, self.identity, features = ImageTower(clip.model), clip.identity, clip.embed_dim
        else:
            vit = load_vit(self.name, self.pretrained, img_size=self.img_size, seed=self.seed)
            backbone, self.identity, features = vit.model, vit.identity, vit.num_features
        self.head = nn.Linear(features, self.head_outputs(), bias=False)
        start = draw(self.seed, "head", 1, self.head_outputs(), features, Distribution("normal"), torch.device("cpu"))
        with torch.no_grad():
            self.head.weight.copy_(0.01 * start[0])
        return backbone

    def build_on(self, other: ImageTask) -> None:
        """Make an empty head of the other's width."""
        self.head = nn.Linear(other.head_weight().shape[1], self.head_outputs(), bias=False)

    def class_logits(self, images: Tensor) -> Tensor:
        """Return the outputs of the head (b, outputs), linear in the features.

        Raises:
            UserError: The backbone gives something else than a vector for each image.
        """
        features: Tensor = self.model(images)
        if not isinstance(features, Tensor) or features.dim() != 2:
            shape = " x ".join(map(str, features.shape[1:])) if isinstance(features, Tensor) else "several tensors"
            raise UserError(
                f"--model.name {self.name}: it returns {shape} per image, and a linear head needs a vector. "
                "Choose a model that pools its tokens (`randlora-pl models` shows some)."
            )
        self.noted(features)
        return self.head(normalize(features) if self.is_clip else features)  # type: ignore[no-any-return]

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return the backbone's groups and the head's own."""
        groups = super().optimizer_groups()
        return groups + parameter_groups(
            self.head.parameters(), self.head_learning_rate or 0.0, self.weight_decay, self.decay_vectors
        )

    def resolved(self) -> dict[str, Any]:
        """Return derived arguments, including the head's learning rate."""
        return super().resolved() | {"head_learning_rate": self.head_learning_rate}

    def rates(self) -> Mapping[str, float | None]:
        """Return the head's learning rate."""
        return {"head": self.head_learning_rate}

    def head_tensors(self) -> dict[str, Tensor]:
        """Return the head's weight (outputs, features)."""
        return {"head": self.head.weight}

    def head_weight(self) -> Tensor:
        """Return the head's weight (outputs, features)."""
        return self.head.weight


class LinearHeadTask(HeadTask, TowerTask):
    """Fine-tunes a vision backbone with a bias-free linear head that starts at N(0, 0.01^2).

    Examples:
        >>> task = LinearHeadTask("vit_tiny_patch16_224", "random", adapter=RandLoRA(rank=6))
        >>> data = ImageData(dataset="digits")
    """

    adopts = "linear head"
    takes_several = True

    def head_outputs(self) -> int:
        """Return the number of classes."""
        return len(self.classnames)
