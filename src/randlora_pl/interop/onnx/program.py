"""Trained models as plain modules without adapters, from pixels or token ids to logits or features.

Pixels are RGB in 0..1; mean and standard deviation are inside the module, so that its users only resize, crop and
divide by 255.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.adapters import read_adapter
from randlora_pl.interop.base_model import refuse_texts
from randlora_pl.tasks import ImageTask, load_task
from randlora_pl.tasks.restore import require_classes
from randlora_pl.utils import __version__
from randlora_pl.utils.image_spec import ImageSpec


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
    """Module from pixels to logits and probabilities of all classes."""

    def __init__(self, encoder: ImageEncoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Map (n, 3, H, W) in 0..1 to (n, classes) logits and probabilities."""
        logits = self.head(self.encoder(pixels))
        return logits, logits.softmax(1)


class TextEncoder(nn.Module):
    """Module from token ids to text features of unit length."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip: Any = clip

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (n, context length) int64 to (n, features)."""
        return F.normalize(self.clip.encode_text(tokens), dim=-1)


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
    refuse_texts(file, "become programs")
    if part != "image":
        require_classes(file.metadata, path, "an exported classifier")
    return make_program(load_task(path, gradient_checkpointing=False), part)


def make_program(task: ImageTask, part: str = "classifier") -> Program:
    """Convert one of `PARTS` of a task with classes to a plain module; its adapter is unloaded permanently.

    Raises:
        UserError: The model has no such part.
    """
    task.eval()
    frame = task.frame
    task.check_part(part)
    described = {
        "classifier": f"logits and probabilities: float32 (n, {len(task.classnames)}), in the order of classnames",
        "image": "features: float32 (n, features)",
        "text": "features: float32 (n, features) of unit length",
    }
    facts = {
        "format_version": FORMAT_VERSION,
        "randlora_pl_version": __version__,
        "part": part,
        "output": described[part],
        "classnames": task.classnames,
        "prompts": list(task.used_prompts().evaluation),
        "task": type(task).__name__,
        "base_model": task.identity.as_dict(),
        "adapter": task.adapter.describe(),
        **task.described_parts(),
    }
    with torch.no_grad():
        if part == "text":
            return _text(task, facts)
        weight = None if part == "image" else task.head_weight()
        task.unload()
        second = task.decoupled if part == "classifier" else None
        unit = task.unit_features and (second is None or second.unit_features)
        encoder = ImageEncoder(task.image_tower(), frame, unit)
        module: nn.Module = encoder
        if weight is not None and second is not None:
            module = ExportedClassifier(encoder, second.classifier(weight))
        elif weight is not None:
            head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            head.weight = nn.Parameter(weight.detach().clone())
            module = ExportedClassifier(encoder, head)
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
    return Program(module.eval().requires_grad_(False), "pixels", outputs, examples, facts)


def _text(task: ImageTask, facts: dict[str, Any]) -> Program:
    """Return the text tower: the trained one, or for a frozen text head the one that encoded its prompts."""
    clip, tokenizer = task.text_model()
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
    return Program(TextEncoder(clip).eval().requires_grad_(False), "tokens", ("features",), examples, facts)
