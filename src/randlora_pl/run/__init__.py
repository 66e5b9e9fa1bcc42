"""One run, callable without the command line.

```
api.fit            a run from Python, with its results as an object
session            run_fit, run_evaluation: lock, build, stages; every error becomes a message
├─ options         the words that were typed, over the config of a run or an adapter
├─ lightning_cli   LightningCLI: builds task, data, trainer and callbacks in a run folder
└─ stages          zero-shot test, training, test, results; test of a saved adapter
   └─ callbacks    facts of a training, checkpoints, plots, and the lines that are printed
run_folder, parallel
```
"""

TIMEOUT = 600.0
"""Seconds to wait for other processes before the run fails, by default."""
