"""A task's backbone on the meta device: names, shapes and counts without weights or a network."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from randlora_pl.language.catalog import KNOWN
from randlora_pl.language.models.classifier import split
from randlora_pl.language.models.loading import RANDOM, model_config
from randlora_pl.language.models.targets import known_targets
from randlora_pl.language.tasks.classification import TextClassificationTask
from randlora_pl.language.tasks.restore import LanguageTask


def meta_backbone(task: LanguageTask) -> nn.Module | None:
    """Build a language task's backbone without values and head; None if its config needs the network.

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
        config = model_config(task.name, task.pretrained, task.config_overrides)
    else:
        config = model_config(source, RANDOM, None)
    import transformers

    with torch.device("meta"):
        model: Any = getattr(transformers, task.auto).from_config(config)
    backbone: nn.Module = split(model)[0] if isinstance(task, TextClassificationTask) else model
    return backbone


def usual_targets(task: LanguageTask, model: Any) -> list[str] | None:
    """Return the targets of a task's adapter: as given, or the paper's for this kind of model."""
    if task.targets is not None or task.adapter.trains_base:
        return task.targets
    return known_targets(str(model.config.model_type))
