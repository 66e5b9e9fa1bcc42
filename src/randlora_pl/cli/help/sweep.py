"""Help page of ``sweep``."""

PAGE = """\
Run a grid of models, data sets, budgets, methods and seeds. Each cell is a run folder; what is done is never done
again, so the same command goes on after a crash, Ctrl-C or a reboot, and several processes may work on one sweep.

  randlora-pl sweep offline --dry-run
  randlora-pl sweep offline --jobs 2
  randlora-pl sweep mine.yaml --tune          searches the learning rates first, see: randlora-pl tune --help
  randlora-pl sweep table11 --only budget=16-shot dataset=dtd,eurosat --max-hours 8
  randlora-pl sweep table11 --launcher slurm --jobs 16 --slurm slurm_partition=gpu gpus_per_node=1 timeout_min=600

  CONFIG                What to run: a shipped config (randlora-pl config list) or a file
  --output DIR          The sweep's folder (default runs/sweeps/NAME); cells of another grid in it are kept
  --dry-run             Only list the cells, with their state and the time and memory that they are expected to take
  --only KEY=VALUE ...  Some cells: model, dataset, budget, method or seed; several values with commas
  --seeds N ...         Other seeds than the config's
  --shard I/N           Every N-th cell, beginning with the I-th: for machines that share no disk
  --retry-failed        Run cells again that failed before
  --max-hours H         Begin no cell that is not expected to end within this time
  --skip-missing        Leave out data sets that are not on this machine
  --data.root DIR       Folder that holds the data sets, or the place of your own (folder, table ...), if the config
                        gives none
  --tune                Search the learning rates on validation samples, then run with the best. The config's part
                        `tune` sets the candidates; resumes after a kill, too. The search is in DIR/tune
  --jobs N              Processes that share the work (default 1)
  --launcher WHERE      local (default), or slurm: an array of N jobs by submitit (pip install 'randlora-pl[slurm]')
  --slurm KEY=VALUE ... Options of submitit for it
"""
