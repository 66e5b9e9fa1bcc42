"""The language experiments: text data, prompts, answers and scores, behind the extra ``language``.

`catalog` imports no PyTorch, so that listing the data sets is instant; what is exported here is loaded on first use.
"""

from typing import Any

__all__ = ["CausalLMTask", "LabelledTexts", "TextClassificationTask", "TextData", "load_language_task"]

_HOMES = {
    "CausalLMTask": "tasks.causal_lm",
    "LabelledTexts": "data.labelled_module",
    "TextClassificationTask": "tasks.classification",
    "TextData": "data.prompts_module",
    "load_language_task": "tasks.restore",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
