"""Help page of ``compare_runs``."""

PAGE = """\
Runs side by side: what differs in their configs, and their results, parameters, time and memory.

  randlora-pl compare runs/quickstart/TIME runs/quickstart/TIME
  randlora-pl compare runs/sweeps/NAME/cells/* --json

  RUN RUN ...      Folders of runs; damaged or unfinished ones are marked and shown partially
  --json           Everything for another program: all options, all figures
"""
