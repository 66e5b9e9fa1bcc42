"""A task's backbone on the meta device: names, shapes and counts without weights or a network."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from randlora_pl.language.catalog import KNOWN
from randlora_pl.language.models.classifier import split
from randlora_pl.language.models.loading import RANDOM, model_config
from randlora_pl.language.tasks.classification import TextClassificationTask
from randlora_pl.language.tasks.restore import LanguageTask


def meta_backbone(task: LanguageTask) -> nn.Module | None:
    """Build a language task's backbone without values and head; None if its config needs the network.

    Raises:
        UserError: The extra is missing, or an option of the model is wrong.
    """
    source = task.pretrained or task.name
    if task.pretrained == RANDOM or Path(source).is_dir():
        config = model_config(task.name, task.pretrained, task.config_overrides)
    elif source in KNOWN:
        config = model_config(source, RANDOM, None)
    else:
        return None
    import transformers

    with torch.device("meta"):
        model: Any = getattr(transformers, task.auto).from_config(config)
    backbone: nn.Module = split(model)[0] if isinstance(task, TextClassificationTask) else model
    return backbone
