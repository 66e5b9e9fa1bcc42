"""Functions of both tasks on texts: learning rates, targets, the tokenizer, and the identity of the base model."""

from typing import Any

from torch import nn

from randlora_pl.adapters import Adapter
from randlora_pl.language.loading import RANDOM, checkpoint_blocks, identity_name, set_checkpointing_mode
from randlora_pl.language.tokenization import BYTES, load_tokenizer
from randlora_pl.models import ModelIdentity
from randlora_pl.tasks import defaults
from randlora_pl.tasks.base import AdaptationTask


def default_learning_rate(task: AdaptationTask, adapter: Adapter) -> float:
    """Return the default learning rate of a method for language models."""
    return defaults.default_learning_rate(adapter, defaults.TEXTS)


def default_targets(task: AdaptationTask, model: Any) -> list[str] | None:
    """Return the targets of a task's adapter: its own, or the paper's for this kind of model."""
    if task.targets is not None or task.adapter.trains_base:
        return task.targets
    return known_targets(str(getattr(model.config, "model_type", "")))


def chosen_tokenizer(tokenizer: str | None, pretrained: str | None) -> str | None:
    """Return the tokenizer option: ``bytes`` by default for random weights."""
    return tokenizer or (BYTES if pretrained == RANDOM else None)


def task_tokenizer(task: Any, sentences: bool = False) -> Any:
    """Load the tokenizer of a task: its own option, else the tokenizer of its weights (see `load_tokenizer`)."""
    for option, source in (("tokenizer", task.tokenizer), ("pretrained", task.pretrained)):
        if source:
            return load_tokenizer(source, sentences, f"--model.{option}")
    return load_tokenizer(task.name, sentences, "--model.name")


def identity_of(task: AdaptationTask) -> ModelIdentity:
    """Return the identity of the base model of a task."""
    seed = task.seed if task.pretrained == RANDOM else None
    return ModelIdentity("transformers", identity_name(task.name), task.pretrained or task.name, None, seed)


def checkpoint_gradients(task: AdaptationTask, backbone: nn.Module) -> None:
    """Make the blocks recompute their activations."""
    checkpoint_blocks(backbone)


def train(task: AdaptationTask, mode: bool = True) -> AdaptationTask:
    """Set the mode of what trains; blocks that recompute have it, too."""
    AdaptationTask.train(task, mode)
    if task.backbone is not None and task.gradient_checkpointing:
        set_checkpointing_mode(task.backbone, mode)
    return task


TARGETS: dict[str, list[str]] = {
    "qwen2": ["qkv", "fc1", "fc2"],  # as in the released scripts: no gate_proj, no o_proj
    "llama": ["qkv", "fc1", "fc2"],
    # All three fused weights, which is what the paper's fractions of parameters agree with; the released scripts name
    # layers that Phi-3 does not have, and would adapt down_proj alone.
    "phi3": ["qkv", "fc1", "fc2"],
    # Every dense layer of the encoder. The head trains as a whole: an update of its first layer, whose name ends in
    # "dense" as well, would be 9,984 parameters more than the paper's 0.72M for RandLoRA-64 of the base model.
    "roberta": ["qkv", "o", "fc1", "fc2"],
    "gpt2": ["q", "v", "fc1", "fc2"],  # E2E: two thirds of c_attn
}
"""Layers that the paper adapts in each family of language models, by the ``model_type`` of transformers' configs.

Targets are aliases of `adapters.targets`, and so fit separate and fused projections alike:

| ``model_type`` | ``qkv``, or ``q`` and ``v`` | ``fc1``, ``fc2`` | ``o`` |
|---|---|---|---|
| qwen2, llama | q_proj, k_proj, v_proj | up_proj, down_proj | o_proj |
| phi3 | qkv_proj | gate_up_proj, down_proj | o_proj |
| roberta | query, key, value | intermediate.dense, output.dense | attention.output.dense |
| gpt2 | rows of attn.c_attn | mlp.c_fc, mlp.c_proj | attn.c_proj |
"""


def known_targets(model_type: str) -> list[str] | None:
    """Return the paper's targets for a family of its models, None for others, whose layers may have other names.

    Examples:
        >>> known_targets("gpt2")
        ['q', 'v', 'fc1', 'fc2']
    """
    return list(TARGETS[model_type]) if model_type in TARGETS else None
