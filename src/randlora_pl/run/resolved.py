"""The resolved config of a run, in which the processes of a job must agree."""

import json

from randlora_pl.run.first_stage import checksum_of
from randlora_pl.run.lightning_cli import App
from randlora_pl.run.options.compose import Tree, flatten
from randlora_pl.run.parallel.launch import launched, meeting_of
from randlora_pl.run.parallel.strategy import AdapterDDP, check_options, common_options
from randlora_pl.run.run_folder import resolved_config, without_seed


def resolved(app: App) -> Tree:
    """Return the config with the values that task and data have derived so far."""
    tree = json.loads(app.parser.dump(app.config, "json", skip_none=False, skip_validation=True))
    model = app.model.resolved()
    if "adapter" in model:  # the run's seed sets it again
        model["adapter"] = without_seed(model["adapter"], tree["model"]["init_args"].get("adapter"))
    return resolved_config(tree, model, app.datamodule.resolved())


def compare_options(app: App) -> None:
    """Let the processes of a job compare their options and the adapter that they load, as soon as they meet."""
    job, strategy = launched(), app.trainer.strategy
    if job is None and not isinstance(strategy, AdapterDDP):
        return
    options = common_options(flatten(resolved(app)))
    file = app.model.saved or (app.model.start and app.model.start.file)
    if file is not None:
        checksum = checksum_of(file.path)
        options["the adapter"] = (checksum, f"SHA-256 {checksum[:12]}, {file.path}")
    if job is not None:
        check_options(meeting_of(job, app.config.run.timeout), options)
    elif isinstance(strategy, AdapterDDP):  # Lightning starts the others
        strategy.options = options
