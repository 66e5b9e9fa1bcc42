"""From an adapter file back to a decoder or an encoder; and a task's backbone on the meta device, without weights."""

from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from randlora_pl.adapters import AdapterFile, read_adapter
from randlora_pl.language.catalog import KNOWN
from randlora_pl.language.loading import RANDOM, model_config, split
from randlora_pl.language.tasks.causal_lm import CausalLMTask
from randlora_pl.language.tasks.classification import TextClassificationTask
from randlora_pl.tasks.restore import make_ready, make_task

LanguageTask = CausalLMTask | TextClassificationTask
"""The tasks on texts."""

TASKS: dict[str, type[LanguageTask]] = {task.__name__: task for task in get_args(LanguageTask)}


def load_language_task(folder: str | Path, **overrides: Any) -> Any:
    """Build the task that an adapter folder was saved from, with its adapter merged for evaluation.

    Args:
        folder: The adapter folder.
        overrides: Constructor arguments to change, for example ``pretrained`` if a folder moved.

    Returns:
        The task in eval mode, on the CPU, ``task.vocabulary`` its tokenizer: ``task.model`` of a `CausalLMTask` writes,
        ``task.classify(texts)`` of a `TextClassificationTask` returns classes.

    Raises:
        UserError: The folder was written by no language task, or its base model is another one.
    """
    file = read_adapter(folder)
    return make_ready(plain_task(file, **overrides), file)


def plain_task(file: AdapterFile, dequantized: bool = False, **overrides: Any) -> LanguageTask:
    """Return the task of an adapter, before its backbone is built; on request without quantization.

    Raises:
        UserError: It was written by no language task.
    """
    if dequantized and file.metadata.get("arguments", {}).get("quantize"):
        overrides["quantize"] = None
    task = make_task(file, TASKS, overrides)
    if isinstance(task, TextClassificationTask):
        task.set_classes(file.metadata["classnames"])
    return task


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
