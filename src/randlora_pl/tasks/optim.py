"""The optimizers and schedules of the protocols, stepped per optimizer step, and the part of a task that uses them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from randlora_pl.adapters.base import all_finite
from randlora_pl.adapters.methods.autolora import Problem, SelectionSearch
from randlora_pl.adapters.operations import by_rate, make_optimizer, rates_of, undecayed
from randlora_pl.models.execution import GRAPHS
from randlora_pl.tasks.objective import Objective
from randlora_pl.utils import rng
from randlora_pl.utils.device import on_cuda
from randlora_pl.utils.errors import UserError

Factor = Callable[[int], float]
"""Factor of a learning rate after a number of finished optimizer steps."""


def parameter_groups(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    decay_vectors: bool,
    factors: Mapping[nn.Parameter, float] = MappingProxyType({}),
    undecayed: Set[nn.Parameter] = frozenset(),
) -> list[dict[str, Any]]:
    """Return optimizer groups of matrices, of vectors and of what is ``undecayed``.

    They are the same for any options, so that a checkpoint fits. Frozen parameters are left out. With ``decay_vectors``
    biases, norms and scalars decay too, as in the protocol.
    Parameters with other ``factors`` of the learning rate than 1 come last, in groups of their own.
    """
    groups = []
    for factor, some in by_rate((each for each in parameters if each.requires_grad), factors):
        decaying, still = [p for p in some if p not in undecayed], [p for p in some if p in undecayed]
        matrices, vectors = [p for p in decaying if p.dim() > 1], [p for p in decaying if p.dim() <= 1]
        kinds = ((matrices, weight_decay), (vectors, weight_decay if decay_vectors else 0.0), (still, 0.0))
        rate = learning_rate * factor
        groups += [{"params": kind, "lr": rate, "weight_decay": decay} for kind, decay in kinds if kind]
    return groups


def schedule_factor(step: int, total: int, warmup: int, final: float, schedule: str = "cosine") -> float:
    """Return the factor of the learning rate at an optimizer step: linear warm-up, then half a cosine or a line.

    Args:
        step: Finished optimizer steps.
        total: Optimizer steps of the whole run.
        warmup: Steps of the linear warm-up, 0 for none.
        final: Factor at the end.
        schedule: ``cosine`` or ``linear``.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    left = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return final + (1 - final) * left


def epoch_factor(epoch: int, epochs: int, learning_rate: float) -> float:
    """Return the factor of a learning rate in an epoch: 1e-5 in the first, then half a cosine that never reaches 0.

    This is the schedule of CoOp and of the papers that build on it. ``epoch`` counts finished epochs, ``epochs`` all,
    and ``learning_rate`` is the peak.
    """
    return 1e-5 / learning_rate if epoch == 0 else 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def set_learning_rates(optimizer: Optimizer, scheduler: LambdaLR, groups: Sequence[dict[str, Any]]) -> None:
    """Set this run's learning rates and decays in an optimizer, new or restored, and a scheduler at the same step.

    The groups must be in the optimizer's order.
    """
    scheduler.base_lrs = [group["lr"] for group in groups]
    for group, own, factor in zip(optimizer.param_groups, groups, scheduler.lr_lambdas, strict=True):
        group["weight_decay"], group["initial_lr"] = own["weight_decay"], own["lr"]
        group["lr"] = own["lr"] * factor(scheduler.last_epoch)
        if "eps" in own:
            group["eps"] = own["eps"]


class Optimization(Objective):
    """Optimizer, schedule, and the procedure of a method between optimizer steps."""

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return the groups of what trains, with their learning rates."""
        model, options = self.model, (self.learning_rate or 0.0, self.weight_decay, self.decay_vectors)
        return parameter_groups(model.parameters(), *options, rates_of(model), undecayed(model))

    def total_steps(self) -> int:
        """Return the optimizer steps of the run, from the data module's plan if it has one.

        Lightning's own estimate makes the data loader, and so fixes its start, before a checkpoint is loaded.
        """
        trainer = self.trainer
        plan = getattr(self.data, "plan", None)
        if plan is None:
            return int(trainer.estimated_stepping_batches)
        return int(plan.steps if trainer.max_steps < 0 else min(plan.steps, trainer.max_steps))

    def rate_factors(self, groups: Sequence[dict[str, Any]]) -> list[Factor]:
        """Return the factor of each group's learning rate, by the schedule.

        Raises:
            UserError: See `check_schedule`.
        """
        if self.schedule != "epochs":
            how = (self.total_steps(), self.warmup_steps, self.final_lr_fraction, self.schedule)
            return [lambda step: schedule_factor(step, *how)] * len(groups)
        data = self.data
        self.check_schedule(data)

        def of_group(rate: float) -> Factor:
            return lambda step: epoch_factor(data.finished_epochs(step), data.epochs, rate)

        return [of_group(group["lr"]) for group in groups]

    def check_schedule(self, data: Any) -> None:
        """Refuse a schedule that does not fit the length of the run, before anything is computed.

        Raises:
            UserError: The schedule is per epoch, and the run is planned in steps or has one epoch.
        """
        if self.schedule != "epochs":
            return
        epochs = getattr(data, "epochs", None)
        if not epochs:
            raise UserError(
                "the schedule of epochs needs --data.epochs, not --data.steps; or use --model.schedule cosine."
            )
        if epochs == 1:
            raise UserError(
                "the schedule of epochs has a rate of 1e-5 in the first epoch, and --data.epochs is 1: set "
                "--data.epochs 2 or more, or use --model.schedule cosine."
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the method's optimizer and its schedule per optimizer step; fused unless 16-mixed scales gradients.

        A fused optimizer would unscale the gradients in its kernel, after any clipping.
        """
        fuses = self.device.type == "cpu" or any(on_cuda(parameter) for parameter in self.parameters())
        fused = fuses and getattr(self.trainer.precision_plugin, "scaler", None) is None
        groups = self.optimizer_groups()
        factors = self.rate_factors(groups)
        optimizer: Optimizer
        if self.optimizer == "sgd":  # whose decay is part of the gradient
            optimizer = SGD(groups, momentum=0.9, fused=fused)
        else:  # with the protocol's betas; a group may have an epsilon of its own
            optimizer = make_optimizer(self.model, groups, betas=(0.9, 0.999), eps=1e-8, fused=fused)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factors), "interval": "step"}}

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
            limit = self.max_grad_norm if gradient_clip_val is None else gradient_clip_val
            self.log("train/grad_norm", nn.utils.clip_grad_norm_(trained, limit or math.inf))

    def log_step(self) -> None:
        """Log the weighted mean loss and accuracy over all samples of an optimizer step, on all devices.

        One small all-reduce in each optimizer step, directly after the gradients' and without Lightning's barrier, adds
        the sums of all processes, so that no host waits for its GPU.
        """
        sums, self.step_sums = self.step_sums, None
        if sums is None:
            return
        if dist.is_initialized():
            dist.all_reduce(sums)
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
        keeps = self.torch_compile in GRAPHS
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
        if (procedure := self.report.procedure) is None:
            return
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # the host waited for the gradients
        if scaled and not bool(all_finite(parameter.grad for parameter in self.parameters())):
            return
        procedure.after_step(self.trainer.global_step, self.total_steps())  # counts this step later

    # The method's procedure

    def start_procedure(self) -> None:
        """Start the procedure of a new or resumed run, with the model on its device."""
        if (procedure := self.report.procedure) is None:
            return
        procedure.start(self.model)
        if isinstance(procedure, SelectionSearch):
            if not hasattr(self.data, "search_batch"):
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
        trainer, held = self.trainer, self._step_features
        batch = trainer.strategy.batch_to_device(self.data.search_batch(step, part))
        if self._draws:
            position = torch.tensor(step * trainer.world_size + trainer.global_rank)
            torch.manual_seed(int(rng.words(self.seed, f"{part}-dropout", position)))
        try:
            with trainer.precision_plugin.forward_context():
                losses, _ = self.sample_losses(batch)
                loss: Tensor = (losses * self.loss_weights(batch)).sum()
        finally:
            self._step_features = held  # of the task's own optimizer step
        return loss
