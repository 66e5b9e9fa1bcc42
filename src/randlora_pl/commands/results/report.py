"""``report``: tables and plots of a sweep."""

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

from randlora_pl.utils.option_types import Folder, Option, Overwrite


def report(
    sweep: Annotated[Path, Option("SWEEP")], *, output: Folder | None = None, overwrite: Overwrite = False
) -> int:
    """Write tables and plots of a sweep as Markdown, CSV and one self-contained HTML page.

    Examples:
        randlora-pl report runs/sweeps/NAME
        randlora-pl report runs/sweeps/NAME --output docs/results/NAME --overwrite

    Args:
        sweep: Folder of a sweep, even one that is still running: cells without a result are marked. Or the folder of a
            report, which is regenerated from its cells.csv
        output: Folder to write (default: SWEEP/report)
        overwrite: Replace the report in that folder. Other files stay

    Note:
        The files:
          index.html   The conclusion, and the difference of each method to a reference method with its interval. Then
                       every cell with its mean and 95 % confidence interval over seeds, and averages over the datasets
                       that all compared methods have. The paper's values, if the sweep names a table. A verdict per
                       pair of methods with comparable rates, the rates, the costs, and how the report was made
          report.md    The same content for a repository
          cells.csv    Every run. summary.csv has every mean, and sweep.yaml the sweep
          figures/     Plots of differences, of accuracy against parameters, and of GPU memory, as PNG and SVG
    """
    from randlora_pl.lab.report.cells import FINISHED
    from randlora_pl.lab.report.collect import read_sweep
    from randlora_pl.lab.report.files import write_report
    from randlora_pl.sweep.folder import REPORT

    found = read_sweep(sweep)
    for line in found.warnings:
        print(f"randlora-pl: warning: {line}", file=sys.stderr)
    files = write_report(found, output or sweep / REPORT, overwrite)
    states = Counter(found.cells["state"])
    others = "".join(f", {count} {state}" for state, count in states.items() if state != FINISHED)
    print(f"{states[FINISHED]} of {len(found.cells)} runs are finished{others}")
    for file in files:
        print(f"{file}: {file.stat().st_size:,} bytes")
    print(f"Next: open {files[0]} in a browser")
    return 0
