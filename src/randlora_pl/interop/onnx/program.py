"""Trained models as plain modules without adapters, from pixels or token ids to logits or features.

Pixels are RGB in 0..1; mean and standard deviation are inside the module, so that its users only resize, crop and
divide by 255.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.adapters import merge_and_unload, read_adapter
from randlora_pl.interop.base_model import refuse_texts
from randlora_pl.models import ImageTower, load_clip
from randlora_pl.models.prompted import image_features
from randlora_pl.tasks import ImageTask, LinearHeadTask, PromptTask, TextHeadTask, VisionLanguageTask, load_task
from randlora_pl.tasks.prompt.decoupled import Decoupled
from randlora_pl.tasks.prompt.tip import Cache
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec
from randlora_pl.utils.version import __version__


class ImageEncoder(nn.Module):
    """Module from pixels to the features of an image tower, of unit length if ``unit``, as CLIP compares them."""

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, frame: ImageSpec, unit: bool) -> None:
        super().__init__()
        self.tower, self.unit = tower, unit
        self.register_buffer("mean", torch.tensor(frame.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(frame.std).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (n, 3, H, W) in 0..1 to (n, features)."""
        features: Tensor = self.tower((pixels - self.mean) / self.std)
        return F.normalize(features, dim=-1) if self.unit else features


class ExportedClassifier(nn.Module):
    """Module from pixels to logits and probabilities of all classes; ``head`` is (classes, features)."""

    head: Tensor

    def __init__(self, encoder: ImageEncoder, head: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("head", head.detach().clone())

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Map (n, 3, H, W) in 0..1 to (n, classes) logits and probabilities."""
        logits = F.linear(self.encoder(pixels), self.head)
        return logits, logits.softmax(1)


class PromptedTower(nn.Module):
    """Module from normalized images to the features of an image tower with learned tokens, which are constants."""

    def __init__(self, visual: nn.Module, tokens: Sequence[Tensor]) -> None:
        super().__init__()
        self.visual, self.count = visual, len(tokens)
        for number, each in enumerate(tokens):
            self.register_buffer(f"tokens{number}", each.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """Map (n, 3, H, W) to (n, features)."""
        return image_features(self.visual, images, [getattr(self, f"tokens{number}") for number in range(self.count)])


class DecoupledClassifier(ExportedClassifier):
    """`ExportedClassifier` with the second head of `DePT` as a linear layer on features that are not normalized."""

    weight: Tensor
    bias: Tensor

    def __init__(self, encoder: ImageEncoder, head: Tensor, second: Decoupled) -> None:
        super().__init__(encoder, head)
        self.share = second.weight
        weight, bias = second.folded()
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", bias.detach().clone())

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Map (n, 3, H, W) in 0..1 to (n, classes) logits and probabilities."""
        features = self.encoder(pixels)
        near, own = F.linear(F.normalize(features, dim=-1), self.head), F.linear(features, self.weight, self.bias)
        logits = (1 - self.share) * near + self.share * own
        return logits, logits.softmax(1)


class CachedClassifier(ExportedClassifier):
    """`ExportedClassifier` with the cache of `TipAdapter`: two products and an exponential more."""

    def __init__(self, encoder: ImageEncoder, head: Tensor, cache: Cache) -> None:
        super().__init__(encoder, head)
        self.cache = cache

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Map (n, 3, H, W) in 0..1 to (n, classes) logits and probabilities."""
        features = self.encoder(pixels)
        logits = F.linear(features, self.head) + self.cache(features)
        return logits, logits.softmax(1)


class TextEncoder(nn.Module):
    """Module from token ids to text features of unit length."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip: Any = clip

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (n, context length) int64 to (n, features)."""
        return F.normalize(self.clip.encode_text(tokens), dim=-1)


def make_classifier(encoder: ImageEncoder, head: Tensor, second: Decoupled | Cache | None) -> ExportedClassifier:
    """Return the classifier with a second head, if there is one."""
    if isinstance(second, Cache):
        return CachedClassifier(encoder, head, second)
    return ExportedClassifier(encoder, head) if second is None else DecoupledClassifier(encoder, head, second)


PARTS = ("classifier", "image", "text")
FORMAT_VERSION = 2
"""Version of the facts in exported files; raise it when a name or its meaning changes. 2: other names of ``resize``."""


@dataclass(frozen=True)
class Program:
    """Frozen module in eval mode, on the CPU, in float32, and the names of its input and its outputs.

    ``examples`` makes an input of n samples from n and a seed; ``facts`` are JSON values for users of the file.
    """

    module: nn.Module
    input: str
    outputs: tuple[str, ...]
    examples: Callable[[int, int], Tensor]
    facts: dict[str, Any]


def load_program(path: Path, part: str = "classifier") -> Program:
    """Load one of `PARTS` of the merged model of an adapter saved by a task.

    Raises:
        UserError: The adapter has no task or class names, or the model has no such part.
    """
    file = read_adapter(path)
    metadata = file.metadata
    refuse_texts(file, "become programs")
    if not metadata.get("task") or not metadata.get("classnames"):
        raise UserError(
            f"{path} has no class names, so a classifier cannot be exported (no training run saved it). "
            f"For merged weights, run: randlora-pl adapter merge {path} --output FILE"
        )
    if part == "text" and metadata["task"] == LinearHeadTask.__name__:
        raise UserError(f"{path} has no text tower: it was trained with a linear head. Use --part classifier or image.")
    task = load_task(path, gradient_checkpointing=False)
    return make_program(task, part, task.frame)


def make_program(task: ImageTask, part: str = "classifier", frame: ImageSpec | None = None) -> Program:
    """Convert one of `PARTS` of a task with classes to a plain module; its adapter is unloaded permanently.

    Raises:
        UserError: The model has no such part.
    """
    task.eval()
    frame = frame or task.image_spec
    if isinstance(task, PromptTask):
        _check_prompts(task, part)
    facts = _facts(task, part)
    with torch.no_grad():
        if part == "text":
            return _text(task, facts)
        weight = None if part == "image" else _head_weight(task)
        _unload(task)
        second = task.decoupled if isinstance(task, PromptTask) and part == "classifier" else None
        unit = not isinstance(second, Decoupled) and (not isinstance(task, LinearHeadTask) or task.is_clip)
        encoder = ImageEncoder(_tower(task), frame, unit)
        module: nn.Module = encoder
        if weight is not None:
            module = make_classifier(encoder, weight, second)
    outputs = ("features",) if part == "image" else ("logits", "probabilities")

    def examples(count: int, seed: int) -> Tensor:
        return torch.rand(count, 3, frame.size, frame.size, generator=torch.Generator().manual_seed(seed))

    if part == "image" and unit:
        facts["output"] += " of unit length"
    facts |= {
        "input": f"pixels: float32 (n, 3, {frame.size}, {frame.size}), RGB in 0..1",
        "preprocessing": f"{frame.steps()}, divide by 255; mean and std are subtracted and divided inside",
        "image_size": frame.size,
        **{name: getattr(frame, name) for name in ("interpolation", "resize", "crop_pct", "background")},
        **{name: list(getattr(frame, name)) for name in ("mean", "std", "fill")},
    }
    return Program(_frozen(module), "pixels", outputs, examples, facts)


def _check_prompts(task: PromptTask, part: str) -> None:
    """Refuse a part of a model that would be another model without its learned prompts or classifier.

    Raises:
        UserError: See above; the message has what works.
    """
    if part == "classifier" and task.prompts.per_image:
        raise UserError(
            f"{task.prompts.method()} encodes the classes again for each image, so no program has them as weights. Use "
            "predict or serve, or --part image."
        )
    if part == "text" and task.prompts.learns:
        raise UserError(
            f"the text tower alone is not what {task.prompts.method()} trained: it learned tokens, not words. Use "
            "--part classifier or image."
        )
    if part == "text" and task.classifier is not None:
        raise UserError(
            "a trained classifier predicts the classes (classifier_steps), so the texts alone are another model. Use "
            "--part classifier or image."
        )


def _tower(task: ImageTask) -> nn.Module:
    """Return the module from normalized images to features; without the text tower."""
    if isinstance(task, PromptTask) and (tokens := task.learned.vision()):
        model: Any = task.model
        return PromptedTower(model.visual, tokens)
    return ImageTower(task.model) if isinstance(task, VisionLanguageTask | PromptTask) else task.model


def _unload(task: ImageTask) -> nn.Module:
    """Return a task's model with merged weights; with the adapter inside if its update depends on the input."""
    return merge_and_unload(task.model) if task.adapter.fixed else task.model


def _head_weight(task: ImageTask) -> Tensor:
    """Return the weight (classes, features) that maps features to logits."""
    match task:
        case VisionLanguageTask() | PromptTask():
            return task.scale() * task.class_features()
        case TextHeadTask():
            return task.head
        case LinearHeadTask():
            return task.head.weight
        case _:
            assert_never(task)  # the logits of another task may not be linear in the features


def _text(task: ImageTask, facts: dict[str, Any]) -> Program:
    """Return the text tower: the trained one, or for a frozen text head the one that encoded its prompts."""
    if isinstance(task, VisionLanguageTask | PromptTask):
        clip: Any = _unload(task)
        tokenizer = task.tokenizer
    elif isinstance(task, TextHeadTask):
        loaded = load_clip(task.name, task.pretrained, seed=task.seed)
        clip, tokenizer = loaded.model, loaded.tokenizer
    else:
        raise UserError(f"{type(task).__name__} has no text tower. Use the part classifier or image.")
    del clip.visual
    prompts = [text.replace("{}", name) for name in task.classnames for text in facts["prompts"]]
    context = int(tokenizer(prompts[:1]).shape[1])

    def examples(count: int, seed: int) -> Tensor:
        tokens: Tensor = tokenizer([prompts[(seed + index) % len(prompts)] for index in range(count)])
        return tokens

    name = task.identity.name if task.identity.config_sha256 else task.name  # without a local path
    same = f", which is open_clip.get_tokenizer({name!r})(texts)" if name != "tiny" else ""
    facts |= {
        "input": f"tokens: int64 (n, {context}), ids of the model's tokenizer",
        "preprocessing": f"randlora_pl.models.load_tokenizer({name!r})(texts){same}",
        "context_length": context,
    }
    return Program(_frozen(TextEncoder(clip)), "tokens", ("features",), examples, facts)


def _facts(task: ImageTask, part: str) -> dict[str, Any]:
    """Return the facts of an exported file that all parts share."""
    outputs = {
        "classifier": f"logits and probabilities: float32 (n, {len(task.classnames)}), in the order of classnames",
        "image": "features: float32 (n, features)",
        "text": "features: float32 (n, features) of unit length",
    }
    learner: dict[str, Any] = {}
    if isinstance(task, PromptTask):
        learner = {"prompt_learner": task.prompts.describe(), "head": task.head and task.head.describe()}
    return {
        "format_version": FORMAT_VERSION,
        "randlora_pl_version": __version__,
        "part": part,
        "output": outputs[part],
        "classnames": task.classnames,
        "prompts": list(task.used_prompts().evaluation),
        "task": type(task).__name__,
        "base_model": task.identity.as_dict(),
        "adapter": task.adapter.describe(),
        **learner,
    }


def _frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)
