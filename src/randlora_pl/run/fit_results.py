"""Facts of a training run: for ``results.json``, for the last lines that are printed, and for its loggers."""

import math
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import TensorBoardLogger

from randlora_pl.run.callbacks import AdapterCheckpoint, Patience, PeakMemory, StartSummary, Throughput
from randlora_pl.run.callbacks.summary import describe
from randlora_pl.run.lightning_cli import App
from randlora_pl.run.parallel.strategy import AdapterDDP
from randlora_pl.tasks import Objective
from randlora_pl.tasks.module import total_steps
from randlora_pl.utils.files import write_text
from randlora_pl.utils.own_classes import import_words
from randlora_pl.utils.run_files import (
    ADAPTER,
    BEST,
    CONFIG,
    LAST,
    environment,
    flat,
    planned,
    read_results,
)
from randlora_pl.utils.text import byte_size, duration, facts_table

Kind = TypeVar("Kind", bound=Callback)


def fit_metrics(app: App) -> dict[str, Any]:
    """Return counts, times, memory and versions of a finished training."""
    trainer, data = app.trainer, app.datamodule
    throughput = callback_of(trainer, Throughput)
    speed = throughput.per_second
    kept = callback_of(trainer, AdapterCheckpoint)
    patience = next((callback for callback in callbacks_of(trainer) if isinstance(callback, Patience)), None)
    early = patience is not None and patience.exhausted and trainer.global_step < total_steps(trainer)
    sizes = {"checkpoint_bytes": app.folder / LAST, "adapter_bytes": app.folder / ADAPTER / "adapter.safetensors"}
    return {
        **kept.validated,
        **({f"best/{kept.monitor}": kept.best, "best/step": kept.best_step} if kept.best is not None else {}),
        **({"stopped_early": patience.reason if early else None} if patience is not None else {}),
        **{name: file.stat().st_size for name, file in sizes.items() if file.is_file()},
        **model_results(app.task),
        **flat("data", planned(data)),
        "steps": trainer.global_step,
        "effective_batch": data.batch_size * trainer.accumulate_grad_batches * trainer.world_size,
        "batch_size": data.batch_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "devices": trainer.world_size,
        **(trainer.strategy.metrics() if isinstance(trainer.strategy, AdapterDDP) else {}),
        "device": str(app.task.device.type),
        "precision": str(trainer.precision),
        "fit_seconds": round(throughput.seconds, 3),
        f"{data.unit}_per_second": round(speed * trainer.world_size, 2) if speed else None,
        "peak_memory_bytes": callback_of(trainer, PeakMemory).peak,
        **environment(),
    }


def model_results(task: Objective) -> dict[str, Any]:
    """Return parameter counts, identity and options of a task whose model is built.

    ``trainable_parameters`` includes a head and prompts, ``adapter_parameters`` does not. ``total_parameters`` counts
    the backbone, its adapter, head and prompts.
    """
    report = task.report
    return {
        "method": report.adapter.method(),
        "trainable_parameters": sum(p.numel() for p in task.parameters() if p.requires_grad),
        "adapter_parameters": report.trainable,
        "total_parameters": sum(p.numel() for p in task.parameters()),
        "basis_fingerprint": report.fingerprint,
        "task": type(task).__name__,
        "base/weights_hash": report.base_hash,
        **flat("base", task.identity.as_dict()),
        **flat("adapter", report.adapter.options()),
        "learning_rate": task.learning_rate,
        **({"head_learning_rate": rate} if (rate := getattr(task, "head_learning_rate", None)) is not None else {}),
        **({} if (metric := task.measure().name) == "acc" else {"metric": metric}),
        **task.facts(),
        "seed": task.seed,
    }


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the trainer's own list of callbacks."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def callback_of(trainer: Trainer, kind: type[Kind]) -> Kind:
    """Return the trainer's callback of a class."""
    return next(callback for callback in callbacks_of(trainer) if isinstance(callback, kind))


FRAGMENT = "ranks.yaml"


def write_found(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the adapter of the facts of a search as a config fragment into its run folder; nothing without one."""
    if (adapter := facts.get("search/adapter")) is None:
        return
    options = {"adapter": adapter, "learning_rate": None}  # the default of this method, not the search's
    text = yaml.safe_dump({"model": {"init_args": options}}, sort_keys=False, width=120)
    head = "# Found by a search on a part of the training samples; train it on all of them with:\n#\n"
    write_text(folder / FRAGMENT, f"{head}#   {training_of(folder)}\n{text}")


def training_of(folder: Path) -> str:
    """Return the command that trains what a run found."""
    path = shlex.quote(str(folder))
    return f"randlora-pl fit --config {path}/{CONFIG} --config {path}/{FRAGMENT}"


def end_page(folder: Path, task: Objective, unit: str = "images", testable: bool = True) -> list[Any]:
    """Return the summary of a training: metrics, paths, next commands.

    Args:
        folder: The run folder.
        task: The task that was trained.
        unit: Noun for a sample: ``images`` or ``samples`` of text.
        testable: True if there are test samples.
    """
    results = read_results(folder)
    files = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))  # its lock is still held
    speed = results[f"{unit}_per_second"]
    adapter = results.get("tested", ADAPTER)
    tested = format_metrics(results, "test", task)
    early, sent = results.get("stopped_early"), results.get("exchange/bytes_per_step")
    rows = {
        "test": tested + (f" ({BEST}, step {results['best/step']:,})" if tested and adapter == BEST else ""),
        "zero-shot": format_metrics(results, "zeroshot", task),
        "stopped early": f"at step {results['steps']:,} of {results['data/steps']:,}: {early}" if early else "",
        "parameters": f"{results['trainable_parameters']:,} trained of {results['total_parameters']:,}",
        "time": f"{duration(results['fit_seconds'], 1)} for {results['steps']:,} steps"
        + (f", {speed:,.0f} {unit}/s" if speed else ""),
        "exchanged": f"{byte_size(sent)} of gradients per step among {results['devices']} devices" if sent else "",
        "peak memory": f"{byte_size(results['peak_memory_bytes'])} ({results['device']})",
        "everything": f"{folder}: {', '.join(files)}",
    }
    path, own = shlex.quote(str(folder)), import_words()
    others = results.get("best/step", results["steps"]) != results["steps"]
    other = f"\n  randlora-pl test --adapter {path}/{BEST if adapter == ADAPTER else ADAPTER}{own}" if others else ""
    tests = f"\n  randlora-pl test --run {path}{own}{other}" if testable else ""
    goes_on = "" if results["finished"] else f"\n  randlora-pl fit --resume {path}{own}"
    board = f"\n  tensorboard --logdir {path}" if (folder / "tensorboard").is_dir() else ""
    given = "--images PATH" if unit == "images" else "--texts FILE"
    use = f"predict --adapter {path}/{adapter} {given} --output predictions.csv{own}"
    if unit != "images":
        use += f"\n  randlora-pl adapter merge {path}/{adapter} --output FOLDER{own}"
    tuned = f"\n  {training_of(folder)}" if (folder / FRAGMENT).is_file() else ""
    following = f"\nNext:{goes_on}{tuned}\n  randlora-pl {use}{tests}{board}"
    return ["", facts_table(rows), following]


def format_metrics(results: Any, name: str, task: Objective) -> str:
    """Return ``accuracy 93.3 %, loss 0.21`` from the keys behind one prefix, as the task shows its metrics."""
    words = {"balanced_accuracy": "balanced accuracy"}
    smallest, largest = (results.get(f"{name}/{end}_class", 0) for end in ("smallest", "largest"))
    hidden = {"score", "macro_f1", "gate_entropy"}
    if largest < 2 * max(1, smallest):  # of similar sizes: accuracy hides none
        hidden.add("balanced_accuracy")
    shown = []
    for key, value in results.items():
        prefix, _, short = key.partition("/")
        if key == f"{name}/loss" and not math.isfinite(value):
            shown.append("loss not finite: the weights or alpha are too large")
            continue
        left_out = short in hidden or short.startswith("unfound/")  # the score is one of the others
        if prefix == name and isinstance(value, float) and math.isfinite(value) and not left_out:
            short = short.removeprefix("acc/")  # one of several tests
            measure = task.measure(short)
            shown.append(f"{words.get(short, measure.called)} {measure.text(value)}")
    return ", ".join(sorted(shown, key=lambda text: text.startswith("loss")))


_TEXTS = ("method", "adapter", "task", "model", "dataset", "precision")
_NUMBERS = (
    "rank", "alpha", "learning_rate", "trainable_parameters", "steps", "global_batch", "shots", "weight_decay",
    "warmup_steps", "seed",
)  # fmt: skip
_SHOWN = ("learning_rate", "method", "rank", "seed", "trainable_parameters")
"""TensorBoard shows five columns at first."""


def log_start(app: App) -> None:
    """Log the options by which runs are compared to all loggers, and start page and config as text to TensorBoard."""
    if not app.trainer.is_global_zero:
        return
    task, plan = app.task, planned(app.datamodule)
    facts = plan | vars(task) | {name: getattr(task.adapter, name, None) for name in ("rank", "alpha")}
    facts |= model_results(task) | {
        "adapter": describe(task.adapter),
        "model": f"{task.identity.name}, {task.identity.pretrained}",
        "global_batch": plan["window"],
        "precision": str(app.trainer.precision),
    }
    known = {name: facts.get(name) for name in _TEXTS + _NUMBERS}
    options = {name: value for name, value in known.items() if isinstance(value, str | int | float)}
    run = f"{app.folder.parent.name}/{app.folder.name}"  # one row, also if the link `latest` leads to it
    texts = {
        "start page": callback_of(app.trainer, StartSummary).text,
        "config.yaml": (app.folder / CONFIG).read_text(encoding="utf-8"),
    }
    for logger in app.trainer.loggers:
        if not isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(options)
            continue
        _, session, _ = _summaries(options, ())
        with _data_of(session) as data:
            data.session_start_info.group_name = run
        _add(logger, session)  # makes the folder
        file = f"{logger.log_dir}/{logger.NAME_HPARAMS_FILE}"  # a zero-shot test left an empty one
        save_hparams_to_yaml(file, options)
        for title, text in texts.items():
            logger.experiment.add_text(title, f"```\n{text.strip()}\n```", app.trainer.global_step)


def log_end(app: App, results: dict[str, Any]) -> None:
    """Name the final metrics of a finished training to TensorBoard's HPARAMS tab, which reads their last values.

    TensorBoard takes its columns from the first run that has any, so that each run names all hyperparameters.
    """
    if not app.trainer.is_global_zero:
        return
    columns = dict.fromkeys(_TEXTS, "") | dict.fromkeys(_NUMBERS, 0.0)
    metrics = [
        name
        for stage in ("test", "val", "zeroshot")
        for name, value in results.items()
        if name.startswith(f"{stage}/") and isinstance(value, float)
    ]
    metrics += ["train/loss", "memory/peak_mb", f"speed/{app.datamodule.unit}_per_second"]
    experiment, _, end = _summaries(columns, metrics)
    with _data_of(experiment) as data:  # TensorBoard sorts by what differs among runs, and then by name
        for info in data.experiment.hparam_infos:
            info.differs = info.name in _SHOWN
    for logger in app.trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            _add(logger, experiment, end)
            logger.finalize("success")


def _summaries(parameters: dict[str, Any], metrics: Any) -> tuple[Any, Any, Any]:
    """Return the summaries of an experiment, and of the start and the end of its session."""
    from torch.utils.tensorboard.summary import hparams  # with TensorBoard

    make: Any = hparams  # without types
    summaries: tuple[Any, Any, Any] = make(parameters, dict.fromkeys(metrics, 0.0))
    return summaries


@contextmanager
def _data_of(summary: Any) -> Iterator[Any]:
    """Hand out the data of a summary, to change what PyTorch's function does not set."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # type: ignore[import-untyped]

    place = summary.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(place.content)
    yield data
    place.content = data.SerializeToString()


def _add(logger: TensorBoardLogger, *summaries: Any) -> None:
    writer = logger.experiment._get_file_writer()
    for summary in summaries:
        writer.add_summary(summary)
