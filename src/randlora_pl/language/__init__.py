"""The language experiments: text data, prompts, answers and scores, behind the extra ``language``.

`known` imports no PyTorch, so that listing the data sets is instant; what is exported here is loaded on first use.
"""

from typing import Any

__all__ = ["CausalLMTask", "LabelledTexts", "TextClassificationTask", "TextData", "load_language_task"]

_HOMES = {
    "CausalLMTask": "causal",
    "LabelledTexts": "labelled",
    "TextClassificationTask": "classification",
    "TextData": "data",
    "load_language_task": "restore",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
