"""Datasets, few-shot subsets, sample order and batches; imports neither adapters nor models.

`catalog` imports no PyTorch, so that listing the datasets is instant; `ImageData` is loaded on first use.

Examples:
    >>> from randlora_pl.data import ImageData
    >>> data = ImageData(dataset="digits", shots=16, batch_size=32)
    >>> data.setup("fit")
    >>> data.classnames[:2], len(data.samples("train"))
    (['zero', 'one'], 160)
"""

from typing import TYPE_CHECKING

from randlora_pl.utils.quick_imports import lazy_exports

if TYPE_CHECKING:
    from randlora_pl.data.loader import DrawPlan
    from randlora_pl.data.module import ImageData
    from randlora_pl.data.unlabelled import open_images

__getattr__, __dir__ = lazy_exports(__name__, __file__)
