"""Small tasks, methods and data that the tests of this folder share."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor

from randlora_pl.adapters import AdaLoRA, Adapter, BitFit, DoRA, FullFineTuning, LoRA, NoLA, RandLoRA, VeRA
from randlora_pl.models.clip import TINY_CONFIG
from randlora_pl.tasks import AdaptationModule, LinearHeadTask, Objective, TextHeadTask, VisionLanguageTask

KINDS: dict[str, type[Objective]] = {
    "vision-language": VisionLanguageTask,
    "text head": TextHeadTask,
    "linear head": LinearHeadTask,
}

NAMING = [kind for kind, task in KINDS.items() if task.has_classes]
"""Kinds that predict classes."""

# Scalings are large so that a few steps move every tensor by more than rounding.
METHODS: dict[str, Callable[[], Adapter]] = {
    "randlora": lambda: RandLoRA(rank=8),
    "lora": lambda: LoRA(rank=2, alpha=8),
    "adalora": lambda: AdaLoRA(rank=3, alpha=48, warmup=0.2, final=0.3, every=2),
    "dora": lambda: DoRA(LoRA(rank=2, alpha=8)),
    "vera": lambda: VeRA(rank=16, alpha=16),
    "nola": lambda: NoLA(num_bases=16),
    "full": lambda: FullFineTuning(),
    "bitfit": lambda: BitFit(),
}


@contextmanager
def two_blocks() -> Iterator[None]:
    """The tiny CLIP with two blocks a tower: what a task does is the same at any depth, and tests are faster."""
    configs: list[dict[str, Any]] = [TINY_CONFIG["model_cfg"][name] for name in ("vision_cfg", "text_cfg")]
    before = [config["layers"] for config in configs]
    for config in configs:
        config["layers"] = 2
    try:
        yield
    finally:  # a test that fails spoils no other
        for config, layers in zip(configs, before, strict=True):
            config["layers"] = layers


SIGMOID = {
    "embed_dim": 24,
    "init_logit_bias": -10.0,
    "custom_text": True,
    "nonscalar_logit_scale": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
"""An architecture with the bias of SigLIP."""


@contextmanager
def sigmoid_clip() -> Iterator[None]:
    """`SIGMOID` as open_clip's ``Small-sigmoid``, registered as a user's own would be."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "Small-sigmoid.json").write_text(json.dumps(SIGMOID))
        open_clip.add_model_config(folder)
        try:
            yield
        finally:
            open_clip.factory._MODEL_CONFIG_PATHS.remove(Path(folder))
            open_clip.factory._MODEL_CONFIGS.pop("Small-sigmoid")


CLASSES = ["zero", "one", "two", "three"]
TEMPLATES = ["a {}", "the digit {}"]


def make(kind: str, method: str = "randlora", **options: Any) -> Objective:
    """A task on the tiny CLIP with random weights, not built yet."""
    task: Callable[..., Objective] = KINDS[kind]
    return task(**({"name": "tiny", "pretrained": "random", "adapter": METHODS[method]()} | options))


def built(kind: str, method: str = "randlora", **options: Any) -> Objective:
    """A task that is built, for four classes, without a trainer."""
    task = make(kind, method, **options)
    task.set_classes(CLASSES, TEMPLATES)
    task.adapt()
    return task


def trained(task: Objective) -> dict[str, Tensor]:
    """Copies of what trains, by name."""
    return {name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad}


def frozen(task: Objective) -> dict[str, Tensor]:
    """Copies of what does not train."""
    return {name: p.detach().clone() for name, p in task.named_parameters() if not p.requires_grad}


def shake(task: Objective, scale: float = 0.05) -> None:
    """Moves everything that trains away from its start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def images(count: int, size: int = 32) -> Tensor:
    """Normal noise, (count, 3, size, size)."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(11))


def batch(
    labels: list[int], weight: list[float] | None = None, micro_batch: int = 0, micro_batches: int = 1
) -> dict[str, Any]:
    """A training batch that is a whole step (or one of its equal micro-batches)."""
    own = torch.tensor(labels)
    classes, counts = torch.unique(own, return_counts=True)
    return {
        "image": images(len(labels)),
        "label": own,
        "weight": torch.full((len(labels),), 1 / len(labels)) if weight is None else torch.tensor(weight),
        "index": torch.arange(len(labels)),
        "step_classes": classes,
        "step_counts": counts,
        "micro_batch": micro_batch,
        "micro_batches": micro_batches,
    }


def in_run(task: Objective, trainer: L.Trainer) -> AdaptationModule:
    """The module of a task that knows its trainer, as at the start of a run."""
    module = AdaptationModule(task)
    module.trainer = trainer
    module.setup("fit")
    return module


class EachStep(L.Callback):
    """Looks at the task after every optimizer step, its clipped gradient still in place, and keeps what was seen."""

    def __init__(self, look: Callable[[Objective], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.seen.append(self.look(pl_module.objective)))  # type: ignore[arg-type]


WORDS = ("red", "old", "tall", "wet", "mild", "loud", "soft", "dry")


def write_pairs(folder: Path, images: int, captions: int) -> Path:
    """A CSV file of noisy images for each of three splits; some captions belong to several images."""
    lines = ["image,caption,split"]
    for split in ("train", "val", "test"):
        for number in range(images):
            name = f"{split}{number}.png"
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
            for part in range(captions):
                first, second = WORDS[(number + part) % len(WORDS)], WORDS[(3 * number + part) % len(WORDS)]
                lines.append(f"{name},a {first} thing that is {second},{split}")
    path = folder / "pairs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path
