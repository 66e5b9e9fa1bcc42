"""A task's backbone on the meta device: names, shapes and counts without weights or a network."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from randlora_pl.language.causal import CausalLMTask
from randlora_pl.language.known import KNOWN
from randlora_pl.language.models import RANDOM, model_config


def meta_backbone(task: Any) -> nn.Module | None:
    """The backbone of a language task without values; None for a model that only the network knows.

    Args:
        task: A language task; its backbone need not be built.

    Raises:
        UserError: The extra is missing, or an option of the model is wrong.
    """
    source = task.pretrained or task.name
    own = task.pretrained == RANDOM or Path(source).is_dir()
    if not own and source not in KNOWN:
        return None
    if own:
        config = model_config(task.name, task.pretrained, getattr(task, "config_overrides", None))
    else:
        config = model_config(source, RANDOM, None)
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForCausalLM if isinstance(task, CausalLMTask) else AutoModelForSequenceClassification
    with torch.device("meta"):
        model: nn.Module = kind.from_config(config)
    return model


def operations_per_token(model: Any) -> int:
    """Floating point operations of one token's forward pass: two for each weight that multiplies it.

    The table of embeddings multiplies nothing, unless it is the output layer as well; attention among the tokens is
    left out, which for texts this short is a few percent.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    table, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    shared = output is not None and output.weight is table
    return int(2 * (total if shared else total - table.numel()))
