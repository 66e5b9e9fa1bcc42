"""The resolved config of a run, in which the processes of a job must agree."""

import json

from randlora_pl.config.classes import Tree
from randlora_pl.config.compose import flatten
from randlora_pl.engine.lightning_cli import App
from randlora_pl.engine.run_folder import resolved_config, without_seed
from randlora_pl.parallel.agreement import common_options
from randlora_pl.parallel.strategy import AdapterDDP


def resolved(app: App) -> Tree:
    """Return the config with the values that task and data have derived so far."""
    tree = json.loads(app.parser.dump(app.config, "json", skip_none=False, skip_validation=True))
    model = app.model.resolved()
    if "adapter" in model:  # the run's seed sets it again
        model["adapter"] = without_seed(model["adapter"], tree["model"]["init_args"].get("adapter"))
    return resolved_config(tree, model, app.datamodule.resolved())


def compare_options(app: App) -> None:
    """Let the processes of a job compare their options as soon as they meet."""
    strategy = app.trainer.strategy
    if isinstance(strategy, AdapterDDP):
        strategy.options = common_options(flatten(resolved(app)))
