"""Summary of a run: the start page, ``results.json``, the loggers, and the last lines that are printed."""

import math
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import TensorBoardLogger

from randlora_pl.adapters import Adapter, InjectionReport, trainable_parameters
from randlora_pl.adapters.derived import derived_buffers
from randlora_pl.adapters.described import Described
from randlora_pl.adapters.operations import undecayed
from randlora_pl.adapters.trained import update_buffers
from randlora_pl.data import ImageData
from randlora_pl.data.base import PlannedData
from randlora_pl.run.callbacks.checkpoint import Patience, RunCheckpoint, planned, validations
from randlora_pl.run.callbacks.progress import PeakMemory, Throughput
from randlora_pl.tasks.module import own_module, total_steps
from randlora_pl.tasks.objective import Objective
from randlora_pl.utils.errors import DryRunEnd
from randlora_pl.utils.files import write_text
from randlora_pl.utils.own_classes import import_words
from randlora_pl.utils.packed import stored_bytes
from randlora_pl.utils.run_files import (
    ADAPTER,
    BEST,
    CONFIG,
    LAST,
    environment,
    flat,
    read_results,
    resume_command,
    run_folder,
)
from randlora_pl.utils.text import byte_size, duration, facts_table, print_above_progress, table

MOST_ROWS = 15
_BYTES = 4  # trainable parameters are float32


def layer_table(report: InjectionReport) -> str:
    """Return a table of the adapted layers of an `InjectionReport`, grouped by kind."""
    groups = report.grouped()
    rows = [(*group[:2], " x ".join(map(str, group[2])), group[3], f"{group[4]:,}") for group in groups[:MOST_ROWS]]
    if rest := groups[MOST_ROWS:]:
        rows.append((f"and {len(rest)} more", "", "", sum(g[3] for g in rest), f"{sum(g[4] for g in rest):,}"))
    return table(("adapted layer", "kind", "out x in", "layers", "trainable"), rows, right=(2, 3, 4))


def facts(trainer: Trainer, task: Objective, data: PlannedData) -> dict[str, str]:
    """Return the summary's rows other than the layers."""
    trainable = sum(p.numel() for p in task.parameters() if p.requires_grad)
    parts, total = task.parameter_parts(), sum(p.numel() for p in task.parameters())
    trains = sum(parts.values())
    split = ": " + ", ".join(f"{name} {count:,}" for name, count in parts.items()) if len(parts) > 1 else ""
    kept = sum(each.numel() for each in task.head_tensors().values() if not each.requires_grad)
    resumed = _BYTES * (trainable + state_size(task)) + buffer_bytes(task)
    saved = _BYTES * (trainable + kept) + buffer_bytes(task, derived=False)
    summary, identity = planned(data), task.identity
    accumulate, world = trainer.accumulate_grad_batches, trainer.world_size
    global_batch = data.batch_size * accumulate * world
    size = f", {identity.image_size} px" if identity.image_size else ""
    factors = [f"{data.batch_size} {data.unit}"]
    factors += [f"{accumulate} micro-batches"] if accumulate > 1 else []
    factors += [f"{world} devices"] if world > 1 else []
    smoothing = getattr(task, "label_smoothing", 0.0)
    shards = getattr(trainer.strategy, "shards", None)
    again = getattr(task.report.adapter, "memory", "low") != "low"  # RandLoRA's option memory
    low = ", adapted ones rebuilt in the backward pass (memory low)" if again else ""
    assert data.plan is not None
    passes, repeats = summary["draws"] / data.plan.num_samples, ""  # epochs of few samples are repeated
    if isinstance(data, ImageData) and data.epochs and passes > data.epochs:
        repeats = f" ({passes:.3g} passes: an epoch has at least {data.min_batches_per_epoch} batches)"
    rates = [f"{name} {rate:g}" for name, rate in task.rates().items() if rate]  # of other parts than the adapter
    if not (rates and task.adapter.trains_base and task.adapter.keeps_base):  # where the adapter trains nothing
        rates.insert(0, f"{task.learning_rate:g}")
    devices = str(task.device) if trainer.num_devices == 1 else f"{trainer.num_devices} devices"
    return {
        "model": f"{identity.name}, {identity.pretrained} weights{size} ({type(task).__name__})",
        **data.summary_lines(summary),
        "prompts": task.prompt_summary(),
        "trainable": f"{trains:,} of {total:,} parameters ({100 * trains / total:.2f} %){split}",
        "batch": f"{global_batch} = {' x '.join(factors)}" if len(factors) > 1 else factors[0],
        "steps": f"{summary['steps']:,} optimizer steps, {summary['draws']:,} {data.unit} drawn{repeats}",
        **validation_row(trainer, task, data),
        "learning rate": ", ".join(rates),
        **other_decay(task),
        "label smoothing": f"{smoothing:g}" if smoothing else "",
        "train/loss": task.loss_note,
        "precision": f"{trainer.precision} on {devices}",
        "sharded": f"{shards}{low}" if shards else "",
        "checkpoint": f"{byte_size(resumed)} to resume, adapter {byte_size(saved)}",
        "seed": str(task.seed),
        "run folder": str(run_folder(trainer)),
    }


def other_decay(task: Objective) -> dict[str, str]:
    """Return a row if a part of the adapter has no weight decay although the task has; an empty dict otherwise."""
    still = sum(each.numel() for each in undecayed(task.model))
    if not still or not task.weight_decay:
        return {}
    decay = f"{task.weight_decay:g}"
    if still < sum(each.numel() for each in trainable_parameters(task.model).values()):
        return {"weight decay": f"{decay}; 0 for {still:,} numbers, whose decay would change the base model"}
    head = f"; head {decay}" if task.trained_head else ""
    return {"weight decay": f"0 instead of {decay}, which would change the base model{head}"}


def buffer_bytes(task: Objective, derived: bool = True) -> int:
    """Return the bytes of the method's kept buffers, such as indices, and of tensors derived from frozen weights."""
    buffers = update_buffers(task.model) | (derived_buffers(task.model) if derived else {})
    return sum(buffer.numel() * buffer.element_size() for buffer in buffers.values())


def state_size(task: Objective) -> int:
    """Return the numbers in the state of optimizer and procedure; a head has AdamW's two moments, SGD has one."""
    trainable: int = sum(p.numel() for p in task.parameters() if p.requires_grad)
    if task.optimizer == "sgd":
        return trainable
    report = task.report
    numbers: int = report.adapter.optimizer_numbers(task.model) + 2 * (trainable - report.trainable)
    return numbers + (report.procedure.state_size() if report.procedure else 0)


def validation_row(trainer: Trainer, task: Objective, data: PlannedData) -> dict[str, str]:
    """Return the number and size of validations, a reason if there are none, or an empty dict."""
    count = validations(trainer, data)
    if count is None or not (data.held_out and trainer.limit_val_batches):
        return {}
    if count == 0 and isinstance(trainer.val_check_interval, int):
        every, batches = trainer.val_check_interval, total_steps(trainer) * trainer.accumulate_grad_batches
        return {"validation": f"none: --trainer.val_check_interval is {every:,}, and the run has {batches:,} batches"}
    if not count:
        return {}
    limit, step = trainer.limit_val_batches, data.eval_batch_size * trainer.world_size
    batches = limit if isinstance(limit, int) else int(limit * math.ceil(data.held_out / step))
    number = min(data.held_out, batches * step)
    size = f"{number:,} {data.unit}" if number == data.held_out else f"{number:,} of {data.held_out:,} {data.unit}"
    few = ", too few to choose by" if number < 50 else ""
    if few and task.measure(several=task.several).name == "acc":
        few += f": accuracies have a standard error of up to {50 / number**0.5:.0f} points"
    return {"validation": f"{count:,} time{'s' if count > 1 else ''} on {size}{few}"}


class StartSummary(Callback):
    """Print one page once, before the first test or the training.

    Args:
        dry: If True, end the run after the page, which has the memory instead of the run folder then.

    Attributes:
        text: The page, once it is printed on rank 0.
    """

    def __init__(self, dry: bool = False) -> None:
        self._printed, self.dry = False, dry
        self.text = ""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the page."""
        if self._printed:
            return
        self._printed = True
        data: PlannedData = trainer.datamodule  # type: ignore[attr-defined]
        if data.plan is None:
            data.setup("fit")  # on every rank: setup synchronizes them
        if trainer.is_global_zero:
            task = own_module(pl_module).objective
            report, adapter = task.report, task.report.adapter
            others: list[Described] = task.parts()
            if not (others and adapter.trains_base and adapter.keeps_base):
                others.append(adapter)
            page: list[str] = ["\n" + "\n".join([" + ".join(map(describe, others)), *report.notes])]
            page += [layer_table(report)] if report.rows else []
            page += [f"adapted: {report.coverage.line}"] if report.coverage.line else []
            rows = facts(trainer, task, data)
            if self.dry:
                weights = sum(map(stored_bytes, task.parameters())) + buffer_bytes(task)
                trained = sum(p.numel() * p.element_size() for p in task.parameters() if p.requires_grad)
                trained += _BYTES * state_size(task)
                rows["memory"] = (
                    f"{byte_size(weights)} of weights, {byte_size(trained)} of gradients and the optimizer's state, "
                    "and activations"  # which depend on the batch and are known only by running
                )
                rows["run folder"] = "none: --dry-run writes nothing"
            self.text = print_above_progress(*page, facts_table(rows), "")
        if self.dry:
            raise DryRunEnd

    on_test_start = on_fit_start  # a zero-shot test comes first, when the training is already planned


def describe(adapter: Described) -> str:
    """Return the method of an adapter or of prompts, an adapter's rank, and the non-default options."""
    if parts := adapter.nested():
        rates = ", ".join(f"{rate:g}" for rate in getattr(adapter, "rates", None) or ())
        return f"{adapter.method()} of {', '.join(map(describe, parts))}{'; rates ' * bool(rates)}{rates}"
    plain = type(adapter)().options()
    shown = []
    for name, value in adapter.options().items():
        if name in ("seed", "match") or (
            value == plain[name] and not (name == "rank" and isinstance(adapter, Adapter))
        ):
            continue
        many = isinstance(value, dict) and len(value) > 3
        text = f"{min(value.values())} to {max(value.values())} by {len(value)} patterns" if many else value
        shown.append(f"{name} {text}")
    return f"{adapter.method()} {', '.join(shown)}".strip()


Kind = TypeVar("Kind", bound=Callback)


def fit_metrics(trainer: Trainer, task: Objective, data: PlannedData) -> dict[str, Any]:
    """Return counts, times, memory and versions of a finished training."""
    folder, throughput = run_folder(trainer), callback_of(trainer, Throughput)
    speed = throughput.per_second
    kept = callback_of(trainer, RunCheckpoint)
    patience = next((callback for callback in callbacks_of(trainer) if isinstance(callback, Patience)), None)
    early = patience is not None and patience.exhausted and trainer.global_step < total_steps(trainer)
    sizes = {"checkpoint_bytes": folder / LAST, "adapter_bytes": folder / ADAPTER / "adapter.safetensors"}
    return {
        **kept.validated,
        **kept.scaled,
        **({f"best/{kept.monitor}": kept.best, "best/step": kept.best_step} if kept.best is not None else {}),
        **({"stopped_early": patience.reason if early else None} if patience is not None else {}),
        **{name: file.stat().st_size for name, file in sizes.items() if file.is_file()},
        **model_results(task),
        **flat("data", planned(data)),
        "steps": trainer.global_step,
        "effective_batch": data.batch_size * trainer.accumulate_grad_batches * trainer.world_size,
        "batch_size": data.batch_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "devices": trainer.world_size,
        "device": str(task.device.type),
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
        **({} if (metric := task.measure(several=task.several).name) == "acc" else {"metric": metric}),
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
    write_text(folder / FRAGMENT, f"{head}#   {_training_of(folder)}\n{text}")


def _training_of(folder: Path) -> str:
    """Return the command that trains what a run found."""
    path = shlex.quote(str(folder))
    return f"randlora-pl fit --config {path}/{CONFIG} --config {path}/{FRAGMENT}"


def end_page(folder: Path, task: Objective, unit: str = "images", testable: bool = True) -> list[Any]:
    """Return the summary of a training run: metrics, paths, next commands.

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
        "scale": _scale_line(results),
        "stopped early": f"at step {results['steps']:,} of {results['data/steps']:,}: {early}" if early else "",
        "parameters": f"{results['trainable_parameters']:,} trained of {results['total_parameters']:,}",
        "time": f"{duration(results['fit_seconds'], 1)} for {results['steps']:,} steps"
        + (f", {f'{speed:,.0f}' if speed >= 10 else f'{speed:.2g}'} {unit}/s" if speed else ""),
        "exchanged": f"{byte_size(sent)} of gradients per step among {results['devices']} devices" if sent else "",
        "peak memory": f"{byte_size(results['peak_memory_bytes'])} ({results['device']})",
        "everything": f"{folder}: {', '.join(files)}",
    }
    path, own = shlex.quote(str(folder)), import_words()
    others = results.get("best/step", results["steps"]) != results["steps"]
    other = f"\n  randlora-pl test --adapter {path}/{BEST if adapter == ADAPTER else ADAPTER}{own}" if others else ""
    tests = f"\n  randlora-pl test --run {path}{own}{other}" if testable else ""
    goes_on = "" if results["finished"] else f"\n  {resume_command(folder)}"
    board = f"\n  tensorboard --logdir {path}" if (folder / "tensorboard").is_dir() else ""
    given = "--images PATH" if unit == "images" else "--texts FILE"
    use = f"predict --adapter {path}/{adapter} {given} --output predictions.csv{own}"
    if unit != "images":
        use += f"\n  randlora-pl adapter merge {path}/{adapter} --output FOLDER{own}"
    tuned = f"\n  {_training_of(folder)}" if (folder / FRAGMENT).is_file() else ""
    following = f"\nNext:{goes_on}{tuned}\n  randlora-pl {use}{tests}{board}"
    return ["", facts_table(rows), following]


def _scale_line(results: Mapping[str, Any]) -> str:
    """Return the scale that ``--checkpoint.scale auto`` has chosen, with both accuracies; "" without one."""
    if "scale" not in results:
        return ""
    own, kept = (
        "{:.1%} (at 0 and 1: {:.1%}, {:.1%})".format(*(results[f"scale/{name}{at}"] for at in ("", "_at_0", "_at_1")))
        for name in ("own", "kept")
    )
    return f"{results['scale']:g}. Validation: own {own}; {results['scale/kept_data']} {kept}"


def format_metrics(results: Any, name: str, task: Objective) -> str:
    """Return ``accuracy 93.3 %, loss 0.21`` from the keys after one prefix, as the task shows its metrics."""
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


def log_start(trainer: Trainer, task: Objective, data: PlannedData) -> None:
    """Log the options by which runs are compared to all loggers, and start page and config as text to TensorBoard."""
    folder, plan = run_folder(trainer), planned(data)
    facts = plan | vars(task) | {name: getattr(task.adapter, name, None) for name in ("rank", "alpha")}
    facts |= model_results(task) | {
        "adapter": describe(task.adapter),
        "model": f"{task.identity.name}, {task.identity.pretrained}",
        "global_batch": plan["window"],
        "precision": str(trainer.precision),
    }
    known = {name: facts.get(name) for name in _TEXTS + _NUMBERS}
    options = {name: value for name, value in known.items() if isinstance(value, str | int | float)}
    run = f"{folder.parent.name}/{folder.name}"  # one row, also if the link `latest` leads to it
    texts = {
        "start page": callback_of(trainer, StartSummary).text,
        "config.yaml": (folder / CONFIG).read_text(encoding="utf-8"),
    }
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(options)
            continue
        _, session, _ = _summaries(options, ())
        with _data_of(session) as content:
            content.session_start_info.group_name = run
        _add(logger, session)  # makes the folder
        file = f"{logger.log_dir}/{logger.NAME_HPARAMS_FILE}"  # a zero-shot test left an empty one
        save_hparams_to_yaml(file, options)
        for title, text in texts.items():
            logger.experiment.add_text(title, f"```\n{text.strip()}\n```", trainer.global_step)


def log_end(trainer: Trainer, unit: str) -> None:
    """Name the final metrics of a finished training to TensorBoard's HPARAMS tab, which reads their last values.

    TensorBoard takes its columns from the first run that has any, so that each run lists all hyperparameters.
    """
    columns = dict.fromkeys(_TEXTS, "") | dict.fromkeys(_NUMBERS, 0.0)
    metrics = [
        name
        for stage in ("test", "val", "zeroshot")
        for name, value in read_results(run_folder(trainer)).items()
        if name.startswith(f"{stage}/") and isinstance(value, float)
    ]
    metrics += ["train/loss", "memory/peak_mb", f"speed/{unit}_per_second"]
    experiment, _, end = _summaries(columns, metrics)
    with _data_of(experiment) as data:  # TensorBoard sorts by what differs among runs, and then by name
        for info in data.experiment.hparam_infos:
            info.differs = info.name in _SHOWN
    for logger in trainer.loggers:
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
