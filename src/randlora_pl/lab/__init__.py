"""Experiments over many runs.

Examples:
    >>> from randlora_pl.lab import Key, Results, read_sweep
    >>> sweep = read_sweep(Path("sweep"))
    >>> [(run.key.method, run.seed, run.accuracy) for run in sweep.finished][:1]
    [('zero-shot', 1, 2.22222)]
    >>> results = Results(sweep)
    >>> results.estimate(Key("tiny CLIP", "digits", "16-shot", "RandLoRA-6")).mean
    97.1296...
"""

from typing import TYPE_CHECKING

from randlora_pl.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from randlora_pl.lab.report.collect import Sweep, read_sweep
    from randlora_pl.lab.report.plan import Key
    from randlora_pl.lab.report.results import Results

__all__ = ["Key", "Results", "Sweep", "read_sweep"]

__getattr__, __dir__ = lazy_exports(__name__, __file__)
