"""Hyperparameters, start page and resolved config of a training for its loggers, so that TensorBoard compares runs."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import TensorBoardLogger

from randlora_pl.run.callbacks import StartSummary
from randlora_pl.run.callbacks.summary import describe
from randlora_pl.run.fit_results import callback_of
from randlora_pl.run.lightning_cli import App
from randlora_pl.utils.files.run_files import CONFIG
from randlora_pl.utils.run_results import model_results, planned

_TEXTS = ("method", "adapter", "task", "model", "dataset", "precision")
_NUMBERS = (
    "rank", "alpha", "learning_rate", "trainable_parameters", "steps", "global_batch", "shots", "weight_decay",
    "warmup_steps", "seed",
)  # fmt: skip
_SHOWN = ("learning_rate", "method", "rank", "seed", "trainable_parameters")
"""TensorBoard shows five columns at first."""
_STAGES = ("test", "val", "zeroshot")


def hyperparameters(app: App) -> dict[str, str | float]:
    """Return the options by which runs are compared; undefined ones are left out."""
    task, plan = app.model, planned(app.datamodule)
    facts = plan | vars(task) | {name: getattr(task.adapter, name, None) for name in ("rank", "alpha")}
    facts |= model_results(task) | {
        "adapter": describe(task.adapter),
        "model": f"{task.identity.name}, {task.identity.pretrained}",
        "global_batch": plan["window"],
        "precision": str(app.trainer.precision),
    }
    known = {name: facts.get(name) for name in _TEXTS + _NUMBERS}
    return {name: value for name, value in known.items() if isinstance(value, str | int | float)}


def log_start(app: App) -> None:
    """Log hyperparameters to all loggers, and start page and resolved config as text to TensorBoard."""
    if not app.trainer.is_global_zero:
        return
    found = hyperparameters(app)
    run = f"{app.folder.parent.name}/{app.folder.name}"  # one row, also if the link `latest` leads to it
    texts = {
        "start page": callback_of(app.trainer, StartSummary).text,
        "config.yaml": (app.folder / CONFIG).read_text(encoding="utf-8"),
    }
    for logger in app.trainer.loggers:
        if not isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(found)
            continue
        _, session, _ = _summaries(found, ())
        _change(session, lambda data: setattr(data.session_start_info, "group_name", run))
        _add(logger, session)  # makes the folder
        file = f"{logger.log_dir}/{logger.NAME_HPARAMS_FILE}"  # a zero-shot test left an empty one
        save_hparams_to_yaml(file, found)
        for title, text in texts.items():
            logger.experiment.add_text(title, f"```\n{text.strip()}\n```", app.trainer.global_step)


def log_end(app: App, results: dict[str, Any]) -> None:
    """Name the final metrics of a finished training to TensorBoard's HPARAMS tab, which reads their last values.

    TensorBoard takes its columns from the first run that has any, so that each run names all hyperparameters.

    Args:
        app: The run.
        results: Its results.
    """
    if not app.trainer.is_global_zero:
        return
    columns = dict.fromkeys(_TEXTS, "") | dict.fromkeys(_NUMBERS, 0.0)
    metrics = [
        name
        for stage in _STAGES
        for name, value in results.items()
        if name.startswith(f"{stage}/") and isinstance(value, float)
    ]
    metrics += ["train/loss", "memory/peak_mb", f"speed/{app.datamodule.unit}_per_second"]
    experiment, _, end = _summaries(columns, metrics)

    def show_first(data: Any) -> None:  # TensorBoard sorts by what differs among runs, and then by name
        for info in data.experiment.hparam_infos:
            info.differs = info.name in _SHOWN

    _change(experiment, show_first)
    for logger in app.trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            _add(logger, experiment, end)
            logger.finalize("success")


def _summaries(parameters: dict[str, Any], metrics: Any) -> tuple[Any, Any, Any]:
    """Return the summaries of an experiment, and of the start and the end of its session."""
    from torch.utils.tensorboard.summary import hparams  # with TensorBoard

    make: Any = hparams  # without types
    found: tuple[Any, Any, Any] = make(parameters, dict.fromkeys(metrics, 0.0))
    return found


def _change(summary: Any, change: Callable[[Any], None]) -> None:
    """Change a part of a summary that PyTorch's function does not set."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # type: ignore[import-untyped]

    place = summary.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(place.content)
    change(data)
    place.content = data.SerializeToString()


def _add(logger: TensorBoardLogger, *summaries: Any) -> None:
    writer = logger.experiment._get_file_writer()
    for summary in summaries:
        writer.add_summary(summary)
