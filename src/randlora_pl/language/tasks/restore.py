"""From an adapter file back to a decoder or an encoder."""

from pathlib import Path
from typing import Any

from randlora_pl.adapters import AdapterFile, read_adapter
from randlora_pl.language.tasks.common import TextTask
from randlora_pl.tasks.restore import make_ready, make_task


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


def plain_task(file: AdapterFile, dequantized: bool = False, **overrides: Any) -> TextTask:
    """Return the task of an adapter, before its backbone is built; on request without quantization.

    Raises:
        UserError: It was written by no language task.
    """
    if dequantized and file.metadata.get("arguments", {}).get("quantize"):
        overrides["quantize"] = None
    task = make_task(file, TextTask, "texts", overrides)  # type: ignore[type-abstract]
    task.take_saved(file.metadata)
    return task
