"""From an adapter file back to a decoder that writes or an encoder that classifies, or to its base model."""

from pathlib import Path
from typing import Any

from torch import nn

from randlora_pl.adapters import AdapterFile, read_adapter
from randlora_pl.language.tasks.causal_lm import CausalLMTask
from randlora_pl.language.tasks.classification import TextClassificationTask
from randlora_pl.tasks.restore import make_ready
from randlora_pl.utils.adapter_schema import check_arguments
from randlora_pl.utils.errors import UserError

LIBRARY = "transformers"
LanguageTask = CausalLMTask | TextClassificationTask
"""The tasks on texts."""

TASKS: dict[str, type[LanguageTask]] = {task.__name__: task for task in (CausalLMTask, TextClassificationTask)}


def load_language_task(folder: str | Path, **overrides: Any) -> Any:
    """Build the task that an adapter folder was saved from, with its adapter merged for evaluation.

    Args:
        folder: The adapter folder.
        overrides: Constructor arguments to change, for example ``pretrained`` where a folder moved.

    Returns:
        The task in eval mode, on the CPU, ``task.vocabulary`` its tokenizer: ``task.model`` of a `CausalLMTask` writes,
        ``task.classify(texts)`` of a `TextClassificationTask` returns classes.

    Raises:
        UserError: The folder was written by no language task, or its base model is another one.
    """
    file = read_adapter(folder)
    task = plain_task(file, **overrides)
    make_ready(task, file)
    return task


def plain_task(file: AdapterFile, **overrides: Any) -> LanguageTask:
    """Return the task of an adapter, before its backbone is built.

    Raises:
        UserError: It was written by no language task.
    """
    kind = TASKS.get(file.metadata.get("task", ""))
    if kind is None:
        raise UserError(f"{file.path} was saved by no language task; load_adapter(model, folder) takes it in Python.")
    arguments = {**file.metadata["arguments"], **overrides}
    check_arguments(kind, arguments, f"{file.path}, arguments of {kind.__name__}")
    task = kind(**arguments, adapter=file.adapter)
    if isinstance(task, TextClassificationTask):
        task.set_classes(file.metadata["classnames"])
    return task


def unquantised_task(file: AdapterFile, **overrides: Any) -> LanguageTask:
    """Return the task of an adapter, without quantization.

    Raises:
        UserError: It was written by no language task.
    """
    whole = {"quantize": None} if file.metadata.get("arguments", {}).get("quantize") else {}
    return plain_task(file, **whole, **overrides)


def base_model(file: AdapterFile) -> nn.Module:
    """Load the base model of an adapter, in eval mode on the CPU.

    Raises:
        UserError: It cannot be had.
    """
    return unquantised_task(file).build()
