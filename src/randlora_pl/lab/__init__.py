"""Experiments over many runs.

Examples:
    >>> from randlora_pl.lab import read_cells
    >>> cells = read_cells(Path("sweep"))
    >>> digits = cells.query("method == 'RandLoRA-6' and dataset == 'digits' and budget == '16-shot'")
    >>> print(digits["accuracy"].mean())
    97.1296...
"""

from typing import TYPE_CHECKING

from randlora_pl.utils.quick_imports import lazy_exports

if TYPE_CHECKING:
    from randlora_pl.lab.report.collect import read_cells

__getattr__, __dir__ = lazy_exports(__name__, __file__)
