"""Small prompt tasks that the tests of this folder share."""

from collections.abc import Callable
from typing import Any

import torch

from randlora_pl.adapters import LoRA, RandLoRA
from randlora_pl.prompts import CoCoOp, CoOp, DeepPrompts, Fixed, MaPLe
from randlora_pl.tasks import DePT, PromptTask, SelfRegulation, TipAdapter

CONTEXT = {"length": 2, "words": None}
KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "coop": lambda: {"prompts": CoOp(**CONTEXT)},
    "coop + randlora": lambda: {
        "prompts": CoOp(**CONTEXT),
        "adapter": RandLoRA(rank=8, dropout=0.2),
        "loss_batch": "joint",
    },
    "maple + dept": lambda: {"prompts": MaPLe(length=2, depth=2), "head": DePT()},
    "promptsrc": lambda: {
        "prompts": DeepPrompts(length=2, vision_length=2, depth=2),
        "regulation": SelfRegulation(templates=3),
    },
    "promptsrc + randlora": lambda: KINDS["promptsrc"]() | {"adapter": RandLoRA(rank=8)},
    "clip-lora": lambda: {"prompts": Fixed(template="a {}."), "adapter": LoRA(rank=2, alpha=8)},
    "two stages": lambda: {"prompts": CoOp(**CONTEXT), "adapter": LoRA(rank=2, dropout=0.2), "classifier_steps": 0.4},
}
"""Options of a task by the name of its method."""
BY_IMAGE: dict[str, Callable[[], dict[str, Any]]] = {"cocoop": lambda: {"prompts": CoCoOp(**CONTEXT)}}
"""Options of tasks whose texts depend on the image."""
WITH_IMAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "tip": lambda: {"prompts": Fixed(template="a {}."), "head": TipAdapter()},
}
"""Options of tasks that need the images of a run."""


def make_prompts(kind: str, **options: Any) -> PromptTask:
    """A task on the tiny CLIP with random weights, not built yet."""
    return PromptTask("tiny", "random", **((KINDS | BY_IMAGE | WITH_IMAGES)[kind]() | options))


def flat(values: dict[str, torch.Tensor]) -> torch.Tensor:
    """All values in one vector."""
    return torch.cat([value.flatten() for value in values.values()])
