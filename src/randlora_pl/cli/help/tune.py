"""Help page of ``tune``."""

PAGE = """\
Search the learning rate (and alpha) of every method of a sweep on validation samples; the test is not read.
Each candidate is tried with one seed, the two best with all seeds of the search; the best mean is taken. The same
command goes on where it stopped. Writes what was tried (tuning.md and .json) and a config with the best (tuned.yaml).

  randlora-pl tune offline --dry-run
  randlora-pl tune offline --jobs 2
  randlora-pl sweep runs/tune/offline/tuned.yaml         or both at once: randlora-pl sweep offline --tune
  randlora-pl tune --config quickstart --data.shots 16   the rate of a single run, with the options of fit

The config's part `tune` sets the candidates:
  tune: {learning_rates: [1e-3, 1e-2], alphas: [1, 10], seeds: [0, 4], datasets: [digits], budgets: [16], set: {...}}
`monitor: val/loss` takes the lowest loss instead of the best val/acc (of GLUE's tasks also val/score).
With `climb: true` a method begins at its own rate and the two beside it, and goes on while the best is outermost.
seeds must be others than the sweep's; without datasets and budgets all of the sweep's are taken, without alphas none.

  CONFIG                What to tune: a shipped config of a sweep or a file
  --output DIR          Where to put it (default runs/tune/NAME)
  --dry-run             Only list the cells of the first round, with the time and memory that they are expected to take
  --only KEY=VALUE ...  Some of it: model or dataset, or methods by their labels in the config (method=LoRA-16)
  --retry-failed        Run candidates again that failed before (a diverged one fails again)
  --max-hours H         Begin no run that is not expected to end within this time
  --skip-missing        Leave out data sets that are not on this machine
  --data.root DIR       Folder that holds the data sets, or the place of your own (folder, table ...), if the config
                        gives none
  --jobs N              Processes that share the work (default 1)
"""
