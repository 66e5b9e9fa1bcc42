"""``report``: tables and plots of a sweep."""

import sys
from collections import Counter
from pathlib import Path

from randlora_pl.commands.common.arguments import CommandParser


def report_verb(args: list[str]) -> int:
    """Run ``report SWEEP [--output DIR] [--overwrite]``."""
    parser = CommandParser("report")
    parser.add_argument("sweep", type=Path)
    parser.add_options(output=Path, overwrite=False)
    options = parser.parse_args(args)
    from randlora_pl.lab.report.cells import FINISHED
    from randlora_pl.lab.report.collect import read_sweep
    from randlora_pl.lab.report.files import write_report
    from randlora_pl.sweep.folder import REPORT

    sweep = read_sweep(options.sweep)
    for line in sweep.warnings:
        print(f"randlora-pl: warning: {line}", file=sys.stderr)
    output = options.output or options.sweep / REPORT
    files = write_report(sweep, output, options.overwrite)
    states = Counter(sweep.cells["state"])
    others = "".join(f", {count} {state}" for state, count in states.items() if state != FINISHED)
    print(f"{states[FINISHED]} of {len(sweep.cells)} runs are finished{others}")
    for file in files:
        print(f"{file}: {file.stat().st_size:,} bytes")
    print(f"Next: open {files[0]} in a browser")
    return 0
