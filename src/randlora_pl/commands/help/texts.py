"""Help pages of the commands that are not functions of their options yet."""

TEXTS = {
    "compare-methods": """\
Compare all methods on one few-shot dataset over several seeds. The command runs a sweep, then prints the mean and
standard error of each method and of two classifiers of raw pixels. Run the same command again to resume after Ctrl-C.

  randlora-pl compare-methods                                 16 shots of the digits, 3 seeds
  randlora-pl compare-methods --methods RandLoRA-6 --seeds 4 5

  --config SWEEP        Sweep to run: a bundled one or a file (default: compare_methods)
  --methods NAME ...    Run only these methods
  --seeds N ...         Seeds to use instead of the config's
  --tune                Search the learning rates on validation images first, then run with the best ones
  --output DIR          Folder of the sweep (default: runs/sweeps/NAME). The table is DIR/table.md

All other options of sweep work, too, such as --jobs N and --dry-run. See: randlora-pl sweep --help
""",
    "sweep": """\
Run a grid of models, datasets, budgets, methods and seeds. Each cell is a run folder. Finished cells are skipped, so
you can run the same command again after a crash, Ctrl-C or a reboot. Several processes can share a sweep.

  randlora-pl sweep offline --dry-run
  randlora-pl sweep offline --jobs 2
  randlora-pl sweep mine.yaml --tune          search the learning rates first (randlora-pl tune --help)
  randlora-pl sweep table11 --only budget=16-shot dataset=dtd,eurosat --max-hours 8
  randlora-pl sweep table11 --launcher slurm --jobs 16 --slurm slurm_partition=gpu gpus_per_node=1 timeout_min=600

  CONFIG                Sweep to run: a bundled config (randlora-pl config list) or a file
  --output DIR          Folder of the sweep (default: runs/sweeps/NAME). Cells of another grid in it are kept
  --dry-run             Only list the cells with their state and their expected time
  --only KEY=VALUE ...  Run only some cells, by model, dataset, budget, method or seed. Separate values with commas
  --seeds N ...         Seeds to use instead of the config's
  --shard I/N           Run every N-th cell, starting with the I-th, for machines without a shared disk
  --retry-failed        Run failed cells again
  --max-hours H         Start no cell that is not expected to end within this time
  --skip-missing        Skip datasets that are not on this machine
  --data.root DIR       Folder with the datasets, or the place of your own data (folder, table ...), if the config has
                        none
  --tune                Search the learning rates on validation samples, then run with the best ones. The config's
                        section `tune` describes the search, which is in DIR/tune and resumes after a kill
  --jobs N              Processes that share the work (default: 1)
  --launcher WHERE      local, or slurm for an array of N jobs (default: local). slurm needs submitit:
                        pip install '.[slurm]' in the checkout
  --slurm KEY=VALUE ... Options of submitit
""",
    "tune": """\
Search the learning rate, and any other option, of each method of a sweep on validation samples. Test samples are not
read. Each candidate is tried with one seed, then the best two with all seeds of the search. The best mean wins. Run the
same command again to resume. It writes all results (tuning.md and .json) and a config with the best (tuned.yaml).

  randlora-pl tune offline --dry-run
  randlora-pl tune offline --jobs 2
  randlora-pl sweep runs/tune/offline/tuned.yaml         or both at once: randlora-pl sweep offline --tune
  randlora-pl tune --config quickstart --data.shots 16   the rate of a single run, with the options of fit
  randlora-pl tune -c quickstart --search learning_rate=1e-4..1e-1 rank=1..32 --sampler tpe --pruner median

The config's section `tune` has the same, and what to search on:
  tune: {search: {learning_rate: [1e-3, 1e-2], rank: [4, 8]}, sampler: grid, seeds: [0, 4], datasets: [digits],
         budgets: [16], monitor: val/acc, set: {...}}
`monitor: val/loss` selects the lowest loss instead of the best val/acc (for GLUE also val/score). The seeds must differ
from the sweep's. The defaults are seed 0, and all datasets and budgets of the sweep.

  CONFIG                Sweep to tune: a bundled config or a file
  --search NAME=VALUES ...
                        Options to search: learning_rate, options of the adapter, or data.batch_size and the like, each
                        with values (1,2,4) or a range (1..64) (default: the learning rate, by factors of two)
  --sampler NAME        climb from each method's own rate while the best one is at the edge (default), grid for all
                        values, or tpe for candidates that Optuna selects
  --trials N            Candidates of each method with tpe (default: 20)
  --pruner NAME         With tpe, end worse runs early: median, or halving (default: none)
  --output DIR          Folder to write (default: runs/tune/NAME)
  --dry-run             Only list the cells of the first round with their expected time
  --only KEY=VALUE ...  Tune only some models, datasets or methods, by their labels in the config (method=LoRA-16)
  --retry-failed        Run failed candidates again (a diverged one fails again)
  --max-hours H         Start no run that is not expected to end within this time
  --skip-missing        Skip datasets that are not on this machine
  --data.root DIR       Folder with the datasets, or the place of your own data (folder, table ...), if the config has
                        none
  --jobs N              Processes that share the work (default: 1)
""",
}
