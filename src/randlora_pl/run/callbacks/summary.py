"""Start summary: one page with model, data, trainable parameters, steps and run folder."""

import math

from lightning.pytorch import Callback, LightningModule, Trainer

from randlora_pl.adapters import Adapter, InjectionReport, trainable_parameters
from randlora_pl.adapters.derived import derived_buffers
from randlora_pl.adapters.described import Described
from randlora_pl.adapters.operations import undecayed
from randlora_pl.adapters.trained import update_buffers
from randlora_pl.data import ImageData
from randlora_pl.data.base import PlannedData
from randlora_pl.run.callbacks.checkpoint import validations
from randlora_pl.tasks.module import own_module, total_steps
from randlora_pl.tasks.objective import Objective
from randlora_pl.utils.errors import DryRunEnd
from randlora_pl.utils.run_files import planned, run_folder
from randlora_pl.utils.text import byte_size, facts_table, print_above_progress, table

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
    """Return the summary's rows beside the layers."""
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
    if few and task.measure().decimals is None:
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
                weights = sum(p.numel() * p.element_size() for p in task.parameters()) + buffer_bytes(task)
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
