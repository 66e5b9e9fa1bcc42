"""``report``: the tables and figures of a sweep."""

import sys
from pathlib import Path

from randlora_pl.cli.common.arguments import Parser

PAGE = """\
Tables and figures of a sweep, as Markdown, CSV and one HTML page that needs nothing else.

  randlora-pl report runs/sweeps/NAME
  randlora-pl report runs/sweeps/NAME --output docs/results/NAME --overwrite

  SWEEP            The folder of a sweep. It may still be running: cells without a result say so. Or the folder of a
                   report, which is made again from its cells.csv
  --output DIR     Where to write (default SWEEP/report)
  --overwrite      Replace the report in it; other files stay

  index.html       mean and 95 % confidence interval over seeds of every cell (each seed in its tooltip), averages over
                   the data sets that every compared method has, the paper's value and the difference where the sweep
                   names a table of it, parameters, time and memory; the learning rate of each method and how it was
                   chosen, and a verdict for each pair of methods whose rates were chosen by one rule
  report.md        the same for a repository
  cells.csv        every run; summary.csv: every mean; sweep.yaml: the sweep
  figures/         accuracy against trained parameters and against training data, as PNG and SVG
"""


def report_verb(args: list[str]) -> int:
    """``report SWEEP [--output DIR] [--overwrite]``.

    Raises:
        UserError: There is no sweep, nothing is finished, or the report would replace something.
    """
    parser = Parser("report")
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args(args)
    from randlora_pl.experiments.report.collect import FINISHED, read_sweep
    from randlora_pl.experiments.report.files import write_report

    sweep = read_sweep(options.sweep)
    for line in sweep.warnings:
        print(f"randlora-pl: warning: {line}", file=sys.stderr)
    output = options.output or options.sweep / "report"
    files = write_report(sweep, output, options.overwrite)
    states = [run.state for run in sweep.runs]
    others = "".join(f", {states.count(state)} {state}" for state in dict.fromkeys(states) if state != FINISHED)
    print(f"{states.count(FINISHED)} of {len(states)} runs are finished{others}")
    for file in files:
        print(f"{file}: {file.stat().st_size:,} bytes")
    print(f"Next: open {files[0]} in a browser")
    return 0
