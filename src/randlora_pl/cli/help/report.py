"""Help page of ``report``."""

PAGE = """\
Tables and figures of a sweep, as Markdown, CSV and one HTML page that needs nothing else.

  randlora-pl report runs/sweeps/NAME
  randlora-pl report runs/sweeps/NAME --output docs/results/NAME --overwrite

  SWEEP            The folder of a sweep. It may still be running: cells without a result are marked. Or the folder of a
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
