"""The stages of a run: test before, training, test after, results."""

import hashlib
import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import SoftFileLease
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from randlora_pl.adapters import load_adapter, read_adapter
from randlora_pl.language.catalog import OWN_TEXTS
from randlora_pl.run.callbacks import HeldLock, PerClass, RunCheckpoint, WrittenAnswers, ZeroShot
from randlora_pl.run.callbacks.checkpoint import check_checkpoint, planned
from randlora_pl.run.callbacks.summary import (
    callback_of,
    callbacks_of,
    end_page,
    fit_metrics,
    format_metrics,
    log_end,
    log_start,
    model_results,
    write_found,
)
from randlora_pl.run.lightning_cli import App, check_frame
from randlora_pl.run.options.compose import Tree, flatten
from randlora_pl.run.options.saved_config import resolved_config, without_seed, write_resolved
from randlora_pl.run.parallel.launch import check_options, common_options, launched, meeting_of
from randlora_pl.run.parallel.strategy import AdapterDDP
from randlora_pl.tasks.losses import check_numbers
from randlora_pl.tasks.module import own_module, total_steps
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import remove_leftovers
from randlora_pl.utils.own_classes import import_words
from randlora_pl.utils.run_files import ADAPTER, BEST, CONFIG, LAST, environment, flat, read_results, write_results
from randlora_pl.utils.text import print_above_progress


def resolved(app: App) -> Tree:
    """Return the config with the values that task and data have derived so far."""
    tree = json.loads(app.parser.dump(app.config, "json", skip_none=False, skip_validation=True))
    model = app.task.resolved()
    if "adapter" in model:  # the run's seed sets it again
        model["adapter"] = without_seed(model["adapter"], tree["model"]["init_args"].get("adapter"))
    return resolved_config(tree, model, app.datamodule.resolved())


def checksum_of(adapter: Path) -> str:
    """Return the SHA-256 of the tensors of an adapter, from its folder or file."""
    file = adapter if adapter.is_file() else adapter / "adapter.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def compare_options(app: App) -> None:
    """Let the processes of a job compare their options and the adapter that they load, as soon as they meet."""
    job, strategy = launched(), app.trainer.strategy
    if job is None and not isinstance(strategy, AdapterDDP):
        return
    options = common_options(flatten(resolved(app)))
    start = app.task.start
    file = app.task.saved or (None if start is None else start.file)
    if file is not None:
        checksum = checksum_of(file.path)
        options["the adapter"] = (checksum, f"SHA-256 {checksum[:12]}, {file.path}")
    if job is not None:
        check_options(meeting_of(job, app.config.run.timeout), options)
    elif isinstance(strategy, AdapterDDP):  # Lightning starts the others
        strategy.options = options


def _report_start(app: App) -> None:
    """Write and log the config once every derived value is known, and write the few-shot sample."""
    if not app.trainer.is_global_zero:
        return
    write_config(app)
    log_start(app.trainer, app.task, app.datamodule)
    if not app.created:
        print_above_progress(f"resumed after step {app.trainer.global_step:,}")
    app.datamodule.write_index(app.folder)


def _load(folder: Path, trainer: Trainer, module: LightningModule) -> None:
    """Load a saved adapter into the model before evaluation."""
    task = own_module(module).objective
    file = load_adapter(task.model, folder)
    if file.metadata.get("several_labels", False) != task.several:
        kinds = ("several labels of an image", "one label of each image")
        there, here = kinds if not task.several else kinds[::-1]
        raise UserError(f"{folder} was trained on {there}, and the data has {here}. Test it on data like its own.")
    check_frame(file, trainer)
    if not file.extra:
        return
    theirs = file.config.get("metadata", {}).get("classnames") or []
    own = task.trained_classes
    trained = task.trained_head or own is not task.classnames
    if theirs == own and (trained or file.metadata["templates"] == task.templates):
        task.load_head(file.extra)
    elif trained:
        sized = all(len(tensor) == len(theirs) for tensor in file.extra.values())
        if not sized or not set(task.classnames) <= set(theirs):
            raise UserError(f"{folder} has a head for {len(theirs)} classes, which are not this dataset's.")
        rows = [theirs.index(name) for name in task.classnames]  # such as 200 of ImageNet's 1,000
        task.load_head({name: tensor[rows] for name, tensor in file.extra.items()})


def loading(folder: Path) -> Callback:
    """Return the callback that loads a saved adapter into the model before evaluation."""
    load = partial(_load, folder)  # strategies that start processes pickle it
    return LambdaCallback(on_test_start=load, on_validation_start=load)


def write_config(app: App) -> None:
    """Write the resolved config of a run, on rank 0."""
    if app.trainer.is_global_zero:
        write_resolved(app.folder / CONFIG, resolved(app), app.created)


def fit(app: App, lock: SoftFileLease, zero_shot: bool = True, test: bool = True) -> None:
    """Run zero-shot test, training and test; write everything to the run folder and print the summary.

    Args:
        app: The run.
        lock: The lock of its folder.
        zero_shot: If True, test the pretrained model before.
        test: If False, the test images are not read.

    Raises:
        UserError: The run to resume is finished; also the errors of its data and checkpoint.
    """
    trainer, task, data, folder = app.trainer, app.task, app.datamodule, app.folder
    compare_options(app)
    before = read_results(folder)
    if before.get("finished"):
        raise UserError(f"{folder} is finished. Test it again with: randlora-pl test --run {folder}{import_words()}")
    task.check_schedule(data)
    if test:
        data.check_test()
    start = _checkpoint(app, before)
    names = [Path(name).name for name in app.command.named]
    configs = names if app.created else [*before.get("config", []), *names[1:]]  # the first is the run's own
    if app.created:
        write(app, {"config": configs, "command": app.command.checksum()} | _start_facts(app.config))
        write_config(app)
    else:
        if trainer.is_global_zero:
            remove_leftovers(folder)
        data.reuse_index(folder)
    if zero_shot and test and task.zero_shot and not any(key.startswith("zeroshot/") for key in before):
        app.model.test_name = "zeroshot"
        switch = ZeroShot()
        callbacks_of(trainer).append(switch)
        metrics = _evaluated(app, trainer.test)
        callbacks_of(trainer).remove(switch)
        app.model.test_name = "test"
        if trainer.received_sigterm:  # during its last batch, where Lightning does not look
            raise SIGTERMException
        _check_losses(metrics, None)
        write(app, metrics)
        if trainer.is_global_zero and metrics:
            print_above_progress(f"zero-shot: {format_metrics(metrics, 'zeroshot', task)}")
    callbacks_of(trainer).insert(0, HeldLock(lock, folder))
    # The config of a resumed run changes only once the checkpoint, its optimizer and its data position are accepted:
    # a wrong option would stay in it, and every later resume would fail, too.
    begin = "on_fit_start" if app.created else "on_train_start"
    callbacks_of(trainer).append(LambdaCallback(**{begin: lambda *_: _report_start(app)}))
    trainer.fit(app.model, data, ckpt_path=start, weights_only=True)
    # Finished: at its last step, or ended early on purpose, not by a time limit.
    timers = [callback.time_remaining() for callback in callbacks_of(trainer) if isinstance(callback, Timer)]
    late = any(left is not None and left <= 0 for left in timers)
    finished = trainer.global_step >= total_steps(trainer) or (trainer.should_stop and not late)
    procedure = task.report.procedure
    facts = procedure.finish() if procedure else {}  # before the test, which may load the best adapter
    tested = _tested(app) if test else {}
    ranks = trainer.strategy.metrics() if isinstance(trainer.strategy, AdapterDDP) else {}
    results = tested | facts | fit_metrics(trainer, task, data) | ranks
    write(app, results | {"config": configs, "finished": False})
    if finished:
        if trainer.is_global_zero:
            log_end(trainer, data.unit)
            write_found(folder, facts)
        write(app, {"finished": True})  # last, as nothing is missing then
    if trainer.is_global_zero:
        print_above_progress(*end_page(folder, task, data.unit, testable=bool(tested) or not test))


def _tested(app: App) -> dict[str, Any]:
    """Test the last weights, or the weights of the best validation, which stay in the model; return the metrics."""
    kept = callback_of(app.trainer, RunCheckpoint)
    best = kept.test == "best" and kept.best is not None and not kept.scaled
    # also for the last: an earlier part of the run may have written "best"
    write(app, {"tested": BEST if best else ADAPTER})
    if best:
        callbacks_of(app.trainer).append(loading(app.folder / BEST))
    metrics = _evaluated(app, app.trainer.test)
    if metrics and kept.test == "best" and kept.best is None and app.trainer.is_global_zero:
        print_above_progress("No validation ran, so the best adapter is unknown and the last one was tested.")
    return metrics


def _evaluated(app: App, run: Callable[..., Any]) -> dict[str, Any]:
    """Return the metrics of a test or a validation, and facts of its classes and answers; empty without samples."""
    metrics = run(app.model, app.datamodule, verbose=False)
    answered = callback_of(app.trainer, WrittenAnswers).facts
    return {**metrics[0], **callback_of(app.trainer, PerClass).facts, **answered} if metrics else {}


def _check_losses(metrics: dict[str, Any], adapter: Path | None) -> None:
    """Refuse metrics of outputs that are not numbers."""
    losses = torch.tensor([value for name, value in metrics.items() if name.endswith("/loss")])
    if adapter is not None:
        check_numbers(losses, adapter)
    elif not losses.isfinite().all():
        raise UserError(
            "The outputs of the pretrained model are not finite: its weights are damaged, or too large for the "
            "precision. Download them again, or try --trainer.precision 32."
        )


def _checkpoint(app: App, before: dict[str, Any]) -> str | None:
    """Return the checkpoint that the training starts from: the resumed run's last one, or ``--ckpt_path``.

    Raises:
        UserError: The file is missing or damaged, or without one, the LoRA that the run began with has changed.
    """
    last = app.folder / LAST
    file = last if not app.created and last.is_file() else app.config.ckpt_path and Path(app.config.ckpt_path)
    if file:
        if not file.is_file():
            raise UserError(f"Checkpoint {file} (--ckpt_path) does not exist; a run keeps its own in RUN/{LAST}.")
        check_checkpoint(file)
        return str(file)
    there = before.get("from/sha256")
    if there is not None and _start_facts(app.config).get("from/sha256", there) != there:
        raise UserError(
            f"{app.config.from_adapter} has changed since this run began, which has no checkpoint yet. Start a new "
            f"run: randlora-pl fit --from-adapter {app.config.from_adapter}"
        )
    return None


def _start_facts(config: Any) -> dict[str, str]:
    """Return path, checksum and place of the LoRA that a run starts from, for ``results.json``."""
    if config.from_adapter is None:
        return {}
    path = Path(config.from_adapter)
    return {"from/adapter": str(path), "from/form": config.from_form, "from/sha256": checksum_of(path)}


def evaluate(app: App, adapter: Path | None) -> None:
    """Run ``test`` or ``validate`` on an adapter or the pretrained model, in a run folder of its own.

    Raises:
        UserError: There is nothing to evaluate.
    """
    trainer, task, data = app.trainer, app.task, app.datamodule
    if adapter is not None:
        task.saved = read_adapter(adapter)
        callbacks_of(trainer).append(loading(adapter))
    compare_options(app)
    name, run = ("test", trainer.test) if app.command.verb == "test" else ("val", trainer.validate)
    write_config(app)
    metrics = _evaluated(app, run)
    _check_losses(metrics, adapter)
    if not metrics:
        limit = getattr(trainer, f"limit_{name}_batches")
        if limit == 0:
            why = f"--trainer.limit_{name}_batches is {limit}."
        elif data.unit == "images":
            why = "the dataset has no images for it (see --data.train_split)."
        else:
            why = f"the dataset has no {data.unit} for it.{_samples_for_it(app, name)}"
        raise UserError(f"{app.command.verb} evaluated nothing: {why}")
    write_config(app)
    facts = model_results(task) | flat("data", planned(data)) | environment()
    write(app, metrics | {"adapter": str(adapter) if adapter else None} | facts)
    if trainer.is_global_zero:
        what = f"adapter {adapter}" if adapter else "pretrained model"
        print_above_progress(
            f"{what} on {data.summary()['dataset']}: {format_metrics(metrics, name, task)}",
            f"results: {app.folder / 'results.json'}",
        )


def _samples_for_it(app: App, name: str) -> str:
    """Return the options that provide texts to evaluate on: a file of the user, or texts held out of training."""
    from randlora_pl.language.data import TokenData

    data, ways = app.datamodule, []
    if isinstance(data, TokenData) and data.dataset in OWN_TEXTS:
        folder = data.root.parent if data.root.is_file() else data.root
        file = folder / f"{name}.{OWN_TEXTS[data.dataset]}"
        ways.append(f"add {file}" + (f" and give --data.root {folder}" if folder != data.root else ""))
    if name == "val":
        ways.append("hold out training samples in fit with --data.validation N")
    elif app.command.folders:
        option, path = next(iter(app.command.folders.items()))
        ways.append(f"use the validation samples: randlora-pl validate --{option} {shlex.quote(str(path))}")
    text = ", or ".join(ways)
    return f" {text[:1].upper()}{text[1:]}"


def write(app: App, metrics: dict[str, Any]) -> None:
    """Write entries of ``results.json``, on rank 0."""
    if app.trainer.is_global_zero:
        write_results(app.folder, metrics)
