"""Data sets, few-shot samples, draws and batches; knows no adapter and no model.

`catalog` imports no PyTorch, so that listing the data sets is instant; `ImageData` is loaded on first use.
"""

from typing import Any

__all__ = ["DrawPlan", "ImageData", "open_images"]

_HOMES = {"ImageData": "module", "DrawPlan": "sampling.schedule", "open_images": "unlabelled"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
