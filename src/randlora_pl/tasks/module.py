"""The one LightningModule, which trains, evaluates and stores an objective, and the trainer that it is made for."""

import math
from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric, MetricCollection

from randlora_pl.adapters.base import DeltaWeight, all_finite
from randlora_pl.adapters.derived import derived_buffers
from randlora_pl.adapters.methods.autolora import Problem, SelectionSearch
from randlora_pl.adapters.methods.randlora import RandLoRADelta
from randlora_pl.adapters.operations import make_optimizer, rates_of, unmerge
from randlora_pl.adapters.save_load import make_adapter
from randlora_pl.adapters.trained import reset_buffers, update_buffers
from randlora_pl.models.execution import GRAPHS
from randlora_pl.tasks.files import check_tensors
from randlora_pl.tasks.objective import Objective
from randlora_pl.tasks.optim import set_learning_rates
from randlora_pl.tasks.run import Run
from randlora_pl.utils import rng
from randlora_pl.utils.device import on_cuda
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.text import filter_library_warnings


@final
class AdaptationModule(LightningModule):
    """Trains, evaluates and stores an objective.

    Its checkpoints hold only what trains, by names of the objective after ``objective.``.

    Examples:
        >>> module = AdaptationModule(VisionLanguageTask("tiny"))
        >>> make_trainer().fit(module, ImageData(dataset="digits", steps=2))

    Args:
        objective: The task.

    Attributes:
        test_name: Prefix of the metrics of a test, ``test`` or, before training, ``zeroshot``.
        procedure_state: State of the method's procedure from a checkpoint, until the training starts.
        step_sums: Sums over the micro-batches of an optimizer step so far, for the logged loss and accuracy.
    """

    def __init__(self, objective: Objective) -> None:
        check_hooks(type(objective))
        super().__init__()
        self.objective = objective
        self.strict_loading = False  # checkpoints hold what trains; load_state_dict checks that strictly
        self.test_name = "test"
        self.procedure_state: dict[str, Any] | None = None
        self.step_sums: Tensor | None = None
        self._draws = True  # random numbers while training

    def _describe_run(self) -> Run[Any]:
        """Return what the objective may know of the run."""
        trainer = self.trainer
        plugin: Any = trainer.precision_plugin

        def loss_factor() -> Tensor | float:
            scaler = getattr(plugin, "scaler", None)  # of 16-mixed
            scale = 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.device))  # stays on the device
            factor: Tensor | float = scale / trainer.accumulate_grad_batches
            return factor

        def gather(tensor: Tensor) -> Tensor:
            tensors: Any = self.all_gather(tensor)
            rows: Tensor = tensors.flatten(0, 1) if trainer.world_size > 1 else tensors
            return rows

        return Run(
            data=getattr(trainer, "datamodule", None),
            device=trainer.strategy.root_device,
            precision=str(trainer.precision),
            rank=trainer.global_rank,
            step=lambda: trainer.global_step,
            total_steps=lambda: total_steps(trainer),
            micro_batches=lambda: trainer.accumulate_grad_batches,
            loss_factor=loss_factor,
            autocast=plugin.forward_context,
            gather=gather,
            broadcast=trainer.strategy.broadcast,
        )

    def setup(self, stage: str) -> None:
        """Let the objective know its run, and take what the stage needs from the data."""
        self.objective.run = self._describe_run()
        self.objective.take_data(stage)

    def configure_model(self) -> None:
        """Build the objective's model, once."""
        if self._trainer is not None:  # callbacks that average weights call this before `setup`
            self.objective.run = self._describe_run()
        self.objective.adapt()
        # Every process has frozen weights, bases and tokens from the same files and seeds: DDP need not send them.
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self._ddp_params_and_buffers_to_ignore = frozen + [name for name, _ in self.named_buffers()]

    # Training

    def on_train_start(self) -> None:
        """Start from unmerged weights, in training mode; typed options take precedence over a checkpoint's rates."""
        task = self.objective
        self.train()
        self.step_sums = None  # of a run that ended within a step
        self._draws = any(draws_random_numbers(module) for module in task.modules() if module.training)
        unmerge(task.model)
        self._start_procedure()
        if task.torch_compile:  # compiled blocks read copies of the bases
            precisions = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
            for module in task.modules():
                if isinstance(module, RandLoRADelta):
                    module.prepare(precisions.get(str(self.trainer.precision), torch.float32))
        scheduler: Any = self.trainer.lr_scheduler_configs[0].scheduler
        set_learning_rates(self.trainer.optimizers[0], scheduler, task.optimizer_groups())
        task.start_training()

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Make dropout a function of the seed and the position in the run, so that a resumed run repeats it."""
        if self._draws:
            position = torch.tensor(batch_idx * self.trainer.world_size + self.trainer.global_rank)
            torch.manual_seed(int(rng.words(self.objective.seed, "dropout", position)))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the weighted sum of the samples' losses; the weights make it the exact mean over the step."""
        task = self.objective
        (losses, right), weight = task.sample_losses(batch), task.loss_weights(batch)
        loss: Tensor = (losses * weight).sum()
        if (carried := task.accumulated_loss(batch)) is not None:
            loss = loss + carried
        penalty, procedure = None, task.report.procedure
        if procedure is not None and batch["micro_batch"] >= batch["micro_batches"] - 1:  # the last of a step
            penalty = procedure.penalty()
        if penalty is not None:
            # Lightning divides by the accumulation, also in a shorter last step. DDP averages over the processes, which
            # all have the same term.
            loss = loss + penalty * self.trainer.accumulate_grad_batches
        values = [torch.ones_like(weight), losses.detach() - task.loss_floor(batch)]
        values += [] if right is None else [right.float()]
        sums = (torch.stack(values) * weight).sum(1)  # for `log_step`
        self.step_sums = sums if self.step_sums is None else self.step_sums + sums
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the method's optimizer and its schedule per optimizer step; fused unless 16-mixed scales gradients.

        A fused optimizer would unscale the gradients in its kernel, after any clipping.
        """
        fuses = self.device.type == "cpu" or any(on_cuda(parameter) for parameter in self.parameters())
        fused = fuses and getattr(self.trainer.precision_plugin, "scaler", None) is None
        groups = self.objective.optimizer_groups()
        factors = self.objective.rate_factors(groups)
        optimizer: Optimizer
        if self.objective.optimizer == "sgd":  # whose decay is part of the gradient
            optimizer = SGD(groups, momentum=0.9, fused=fused)
        else:  # with the protocol's betas; a group may have an epsilon of its own
            optimizer = make_optimizer(self.objective.model, groups, betas=(0.9, 0.999), eps=1e-8, fused=fused)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factors), "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let the objective change the gradients of the step."""
        self.objective.before_step(optimizer.param_groups)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the whole gradient once per optimizer step, by Lightning's options if they are given.

        The official code clips every micro-batch. The norm before clipping is logged, and the loss and accuracy of the
        step.
        """
        self.log_step()
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if gradient_clip_algorithm == "value":  # Lightning's own function takes no fused optimizer
            nn.utils.clip_grad_value_(trained, math.inf if gradient_clip_val is None else gradient_clip_val)
        else:
            limit = self.objective.max_grad_norm if gradient_clip_val is None else gradient_clip_val
            self.log("train/grad_norm", nn.utils.clip_grad_norm_(trained, limit or math.inf))

    def log_step(self) -> None:
        """Log the weighted mean loss and accuracy over all samples of an optimizer step, on all devices.

        One small all-reduce in each optimizer step, directly after the gradients' and without Lightning's barrier, adds
        the sums of all processes, so that no host waits for its GPU.
        """
        sums, self.step_sums = self.step_sums, None
        if sums is None:
            return
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        own = self.trainer.progress_bar_callback
        bar = own is not None and not getattr(own, "reads_metrics", False)  # the host waits for Lightning's bars
        means = sums[1:] / sums[0].clamp(min=torch.finfo(sums.dtype).tiny)
        for name, value in zip(("loss", "acc"), means, strict=False):  # a task may have no accuracy
            self.log(f"train/{name}", value, prog_bar=bar)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Drop the gradients; with CUDA graphs set them to zero in memory of their own.

        A graph's memory, which PyTorch would take for the gradient of a first backward pass, is written again by the
        next micro-batch.
        """
        keeps = self.objective.torch_compile in GRAPHS
        optimizer.zero_grad(set_to_none=not keeps)
        if keeps:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any | None = None) -> None:
        """Do an optimizer step and then call the procedure, before any callback can save.

        A step that 16-mixed skips because a gradient is not finite is skipped here, too.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if (procedure := self.objective.report.procedure) is None:
            return
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # the host waited for the gradients
        if scaled and not bool(all_finite(parameter.grad for parameter in self.parameters())):
            return
        procedure.after_step(self.trainer.global_step, total_steps(self.trainer))  # counts this step later

    # The method's procedure

    def _start_procedure(self) -> None:
        """Start the procedure of a new or resumed run, with the model on its device."""
        if (procedure := self.objective.report.procedure) is None:
            return
        procedure.start(self.objective.model)
        if isinstance(procedure, SelectionSearch):
            if not hasattr(self.objective.run.data, "search_batch"):
                raise UserError("AutoLoRA needs a data module that holds out training samples, such as ImageData.")
            trainer = self.trainer
            scaler: Any = getattr(trainer.precision_plugin, "scaler", None)  # of 16-mixed
            procedure.problem = Problem(
                train_loss=lambda step: self._search_loss(step, "train"),
                search_loss=lambda step: self._search_loss(step, "search"),
                rates=lambda: [
                    (p, group["lr"]) for group in trainer.optimizers[0].param_groups for p in group["params"]
                ],
                average=lambda gradient: trainer.strategy.reduce(gradient, reduce_op="mean"),
                scale=lambda: 1.0 if scaler is None else scaler.get_scale(),
            )
        if self.procedure_state is not None:
            procedure.load_state_dict(self.procedure_state)
            procedure.ran, self.procedure_state = True, None

    def _search_loss(self, step: int, part: Literal["search", "train"]) -> Tensor:
        """Return the mean loss of a search batch, with dropout as a function of the seed and the step."""
        trainer, task = self.trainer, self.objective
        held = task.step_features
        assert task.run.data is not None
        batch = trainer.strategy.batch_to_device(task.run.data.search_batch(step, part))
        if self._draws:
            position = torch.tensor(step * trainer.world_size + trainer.global_rank)
            torch.manual_seed(int(rng.words(task.seed, f"{part}-dropout", position)))
        try:
            with trainer.precision_plugin.forward_context():
                losses, _ = task.sample_losses(batch)
                loss: Tensor = (losses * task.loss_weights(batch)).sum()
        finally:
            task.step_features = held  # of the task's own optimizer step
        return loss

    # Evaluation, on merged weights

    def on_validation_epoch_start(self) -> None:
        """Prepare the evaluation."""
        self.objective.prepare_evaluation()

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        """Evaluate a batch of the validation split."""
        return self._evaluate(batch, "val", "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        """Evaluate a batch of the test split."""
        return self._evaluate(batch, "test", self.test_name)

    def _evaluate(self, batch: dict[str, Any], stage: str, name: str) -> Any:
        """Evaluate a batch, and log the running metrics under a name; Lightning computes and resets them at the end."""
        outputs = self.objective.evaluate(batch, stage)
        for key, metric in self.objective.stage_metrics(stage).items():
            self.log(f"{name}/{key}", metric, on_step=False, on_epoch=True, prog_bar=stage == "val")
        return outputs

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the predictions of a batch, of the data module or of `randlora_pl.data.open_images`."""
        return self.objective.predict(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole validation, and end it."""
        self._finish("val", "val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole test, and end it."""
        self._finish("test", self.test_name)

    def _finish(self, stage: str, name: str) -> None:
        """Log the metrics that all processes have computed from all samples, the first one in the progress bar, too."""
        for number, (key, value) in enumerate(self.objective.final_metrics(stage).items()):
            self.log(f"{name}/{key}", value, prog_bar=number == 0)
        self.objective.finish_evaluation()

    def on_predict_epoch_end(self) -> None:
        """End the evaluation."""
        self.objective.finish_evaluation()

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what trains and the kept buffers, and add the adapter, the base model and derived tensors."""
        task = self.objective
        derived = task.own(derived_buffers(task.model))
        own = {f"objective.{name}" for name in task.trained_state().keys() - derived.keys()}
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in own}
        checkpoint["derived"] = {f"objective.{name}": value.detach() for name, value in derived.items()}
        checkpoint["adapter"] = task.adapter.describe()
        checkpoint["base_model"] = self._base_model()
        checkpoint["rates"] = self._rates()
        if (procedure := task.report.procedure) is not None:
            waiting = self.procedure_state  # of a checkpoint, before the training starts
            checkpoint["procedure"] = procedure.state_dict() if waiting is None else waiting

    def _base_model(self) -> str:
        """Return name and weights of the base model as text."""
        identity, report = self.objective.identity, self.objective.report
        return f"{identity.library} {identity.name} {identity.pretrained} (weights {report.base_hash[:12]})"

    def _rates(self) -> dict[str, float]:
        """Return the factors of the learning rate by name, for tensors with a factor other than 1."""
        factors, named = rates_of(self.objective.model), self.objective.named_parameters()
        return {name: factors[each] for name, each in named if factors.get(each, 1.0) != 1}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another adapter or base model, with both values, or of more steps than the run has."""
        trains = self._trainer is not None and self.trainer.state.fn == "fit"
        done = int(checkpoint.get("global_step", 0))
        if trains and getattr(self.objective.run.data, "plan", None) is not None and done > total_steps(self.trainer):
            raise UserError(
                f"{done:,} steps are done; this run has only {total_steps(self.trainer):,}. "
                "Set a larger --data.steps (or --data.epochs), or start a new run."
            )
        if theirs := checkpoint.get("adapter"):
            saved = make_adapter(theirs["method"], theirs["options"], "the checkpoint")  # knows later options, too
            identities = (saved.identity(), self.objective.adapter.identity())
            there, here = ({"method": each["method"], **each["options"]} for each in identities)
            for name, value in here.items():
                if there.get(name) != value:
                    raise UserError(
                        f"adapter.{name} is {there.get(name)} in the checkpoint and {value} in this run; "
                        "remove the option, or start a new run."
                    )
        own = self._base_model()
        base = checkpoint.get("base_model", own)
        if base.rpartition("(weights")[2] != own.rpartition("(weights")[2]:  # the same weights may lie elsewhere
            raise UserError(f"the checkpoint was trained on {base}, this run has {own}; choose the same base model.")
        before, now = checkpoint.get("rates", {}), self._rates()
        for name in [*now, *before] if trains else ():
            if before.get(name, 1.0) != now.get(name, 1.0):
                raise UserError(
                    f"{name} trains at {before.get(name, 1.0):g} times the learning rate in the checkpoint and "
                    f"at {now.get(name, 1.0):g} times in this run. Give the adapter the rates of the checkpoint, or "
                    "start a new run."
                )
        checkpoint["state_dict"] |= checkpoint.get("derived") or {}
        self.procedure_state = checkpoint.get("procedure")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what trains, or a whole state, strictly; statistics that it lacks become the base model's."""
        task = self.objective
        if foreign := next((name for name in state_dict if not name.startswith("objective.")), None):
            raise UserError(
                f"the checkpoint does not fit: {foreign} lacks the prefix objective., so another module than "
                "AdaptationModule wrote it. Leave it out (--ckpt_path), or add the prefix to the names of a task."
            )
        kept = task.own(update_buffers(task.model)).keys() - task.own(derived_buffers(task.model)).keys()
        needed = {f"objective.{name}" for name in task.trained_parameters().keys() | kept}
        check_tensors(state_dict, self.state_dict(), needed, "the checkpoint")
        reset_buffers(task.model)
        return super().load_state_dict(state_dict, strict=False, assign=assign)


SETTINGS: dict[str, Any] = {
    "max_epochs": 1,  # the data module plans the samples of a whole run as one epoch
    "accelerator": "auto",
    "precision": "32-true",
    "use_distributed_sampler": False,  # the data module shards
    "num_sanity_val_steps": 0,  # the test before the training does more
    "log_every_n_steps": 10,
    "enable_checkpointing": False,  # the callback RunCheckpoint does it
    "enable_model_summary": False,  # the callback StartSummary does it
}
"""Settings of Lightning's Trainer that every task needs."""


def make_trainer(**options: Any) -> Trainer:
    """Make a trainer for scripts and notebooks: one device, nothing printed and nothing written.

    It is the command line's without its callbacks; Lightning's remarks are hidden from now on.

    Examples:
        >>> trainer = make_trainer(accelerator="cpu", enable_progress_bar=True)

    Args:
        options: Options of Lightning's Trainer, which take precedence. ``enable_progress_bar=True`` shows a bar,
            ``logger=CSVLogger(DIR)`` keeps the curves, ``callbacks=[RunCheckpoint()]`` with
            ``default_root_dir=DIR`` the adapter.
    """
    filter_library_warnings()
    silent = {"logger": False, "enable_progress_bar": False, "devices": 1}
    return Trainer(**(SETTINGS | silent | options))


def total_steps(trainer: Trainer) -> int:
    """Return the optimizer steps of a run, from the data module's plan if it has one.

    Lightning's own estimate makes the data loader, and so fixes its start, before a checkpoint is loaded.
    """
    plan = getattr(getattr(trainer, "datamodule", None), "plan", None)
    if plan is None:
        return int(trainer.estimated_stepping_batches)
    return int(plan.steps if trainer.max_steps < 0 else min(plan.steps, trainer.max_steps))


def own_module(module: LightningModule | None) -> AdaptationModule:
    """Return the module of a run as one with an objective, which callbacks and strategies of this program need.

    Raises:
        UserError: It is another one.
    """
    if not isinstance(module, AdaptationModule):
        raise UserError(f"{type(module).__name__} has no objective: train AdaptationModule(task).")
    return module


_INSTEAD = {
    "setup": "take_data",
    "configure_model": "build",
    "configure_optimizers": "optimizer_groups",
    "training_step": "sample_losses",
    "validation_step": "evaluate",
    "test_step": "evaluate",
    "predict_step": "predict",
    "on_train_start": "start_training",
    "on_before_optimizer_step": "before_step",
    "on_validation_epoch_end": "final_metrics",
    "on_test_epoch_end": "final_metrics",
}
"""Hooks of Lightning, and the methods of an objective that `AdaptationModule` calls there."""

_HOOKS = {name for base in (ModelHooks, DataHooks, CheckpointHooks) for name in vars(base) if name[0] != "_"}
_HOOKS |= {*_INSTEAD, "backward", "lr_scheduler_step", "optimizer_step", "optimizer_zero_grad"}
_HOOKS |= {"configure_callbacks", "configure_gradient_clipping"}


def check_hooks(kind: type[Objective]) -> None:
    """Refuse a task that defines a hook of Lightning, which nothing calls.

    Raises:
        UserError: It does; the message has the hook, and what takes its place.
    """
    for hook in sorted(_HOOKS):
        if hasattr(kind, hook):
            place = f"define {_INSTEAD[hook]} instead" if hook in _INSTEAD else "move it to a callback of Lightning"
            raise UserError(
                f"{kind.__name__} defines {hook}, which Lightning calls in AdaptationModule only, never in a task: "
                f"{place}."
            )


_FIXED = (nn.Linear, nn.LayerNorm, nn.ModuleDict, nn.ModuleList, nn.Sequential, nn.ParameterDict, nn.ParameterList)
"""Modules that draw no random numbers."""


def draws_random_numbers(module: nn.Module) -> bool:
    """Return True if a module in training mode has dropout, or might draw random numbers in another way."""
    if isinstance(module, nn.Dropout):
        return module.p > 0
    own = type(module).__module__.partition(".")[0] == __name__.partition(".")[0]
    if isinstance(module, DeltaWeight) and own:
        return module.drops
    return not (own or type(module) in _FIXED or isinstance(module, Metric | MetricCollection))
