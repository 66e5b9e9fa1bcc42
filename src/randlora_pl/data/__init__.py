"""Datasets, few-shot subsets, sample order and batches; imports neither adapters nor models.

`catalog` imports no PyTorch, so that listing the datasets is instant; `ImageData` is loaded on first use.
"""

from typing import Any

__all__ = ["DrawPlan", "ImageData", "open_images"]

_HOMES = {"ImageData": "module", "DrawPlan": "sampling.schedule", "open_images": "unlabelled"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
