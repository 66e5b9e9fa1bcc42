"""Run a module as ``python -m`` does, with the quick imports of the command line: two seconds less for each process.

Usage: ``python -m tests.support.quick MODULE ARGUMENTS``.
"""

import runpy
import sys

from randlora_pl.utils.quick_imports import quick_imports

if __name__ == "__main__":
    with quick_imports("torchmetrics", "open_clip"):
        del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
