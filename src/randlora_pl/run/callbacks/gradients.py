"""Measurements of a training run: tensors without gradients, the share that LoRA cannot follow, rank of the updates."""

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from randlora_pl.adapters.base import DeltaWeight, FactoredDelta
from randlora_pl.adapters.derived import spectrum
from randlora_pl.adapters.kernels.common import without_autocast
from randlora_pl.adapters.layers import AdaptedLayer, BuiltWeight, RowBlocks
from randlora_pl.adapters.operations import delta_weights
from randlora_pl.adapters.sites import out_and_in, weight_of
from randlora_pl.tasks.module import own_module, total_steps
from randlora_pl.utils.errors import UserError, log
from randlora_pl.utils.options import Declared, NotNegative
from randlora_pl.utils.run_files import run_folder, write_results

STEPS = 2
"""Of two factors whose product starts at zero, the second factor gets a gradient from the second step on."""


class GradientFlow(Declared, Callback):
    """Report every trainable tensor without a non-zero gradient in the first two optimizer steps.

    Tensors whose learning rate is 0 in these steps train later, and are left out.
    """

    action: Literal["warn", "raise", "off"] = "warn"
    """``warn`` logs a warning, ``raise`` stops the run, ``off`` disables the check."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.silent: list[str] = []
        self._seen: set[str] = set()
        self._steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Skip a resumed run, which was checked before."""
        self._steps = STEPS if self.action == "off" or trainer.global_step else 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Record tensors that have a gradient, and report at the second step."""
        if self._steps >= STEPS:
            return
        later = {id(value) for group in optimizer.param_groups if group["lr"] == 0 for value in group["params"]}
        own = ((name.removeprefix("objective."), value) for name, value in pl_module.named_parameters())
        trained = {name: value for name, value in own if value.requires_grad and id(value) not in later}
        moved = {name: value.grad.any() for name, value in trained.items() if value.grad is not None}
        flags = torch.stack(list(moved.values())).tolist() if moved else []  # the host waits for a GPU once
        self._seen |= {name for name, flag in zip(moved, flags, strict=True) if flag}
        self._steps += 1
        if self._steps < STEPS:
            return
        self.silent = [name for name in trained if name not in self._seen]
        if not self.silent:
            return
        names = ", ".join(self.silent[:5]) + (" ..." if len(self.silent) > 5 else "")
        text = f"{len(self.silent)} of {len(trained)} trainable tensors had no gradient in {STEPS} steps: {names}"
        if self.action == "raise":
            raise UserError(f"{text}. They are trainable but are never updated. Check --model.targets.")
        log.warning("%s", text)


class _Measured(Declared, Callback):
    """Base of measurements of some optimizer steps, whose values are logged and written as lists to the results."""

    prefix: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]

    every_n_steps: Annotated[int, NotNegative] = 0
    """Optimizer steps between two measurements, 100 for instance; the last step is always measured. 0 disables it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.history: dict[str, list[float]] = {name: [] for name in ("steps", *self.metrics)}

    def state_dict(self) -> dict[str, Any]:
        """Return the values so far."""
        return {"history": {name: list(values) for name, values in self.history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the values of the resumed run."""
        self.history = {name: list(state_dict["history"][name]) for name in self.history}

    def record(self, trainer: Trainer, step: int, values: dict[str, float]) -> None:
        """Keep and log the values of a step."""
        for name, value in {"steps": step, **values}.items():
            self.history[name].append(round(value, 4))
        for logger in trainer.loggers:  # the module's own log skips steps
            logger.log_metrics({f"{self.prefix}/{name}": value for name, value in values.items()}, step=step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the values to the run's results."""
        if trainer.is_global_zero and self.history["steps"]:
            write_results(run_folder(trainer), {f"{self.prefix}/{name}": v for name, v in self.history.items()})


class UnseenGradient(_Measured):
    """Log the share of the gradient that no small change of LoRA's matrices can follow, as ``unseen_gradient/...``.

    To first order, a change of B and A changes the weight within the span of B's columns and of A's rows. For the
    gradient G (out, in) of the weight and the projections P_B and P_A on these, ``share`` is
    ||(I - P_B) G (I - P_A)||^2 / ||G||^2, with both sums over the layers. ``relative`` is the share divided by a random
    gradient's, (1 - rank B / out) (1 - rank A / in). If it is above one half when the loss stops falling, a higher rank
    may help: see ``--from-adapter``.

    G is of the first micro-batch of an optimizer step, on the first device, over linear and attention layers. It is
    computed during the backward pass, one layer at a time, and the training has the same bits as without. A text tower
    that gradient accumulation encodes once per step has its gradient in the last micro-batch, and is left out. The
    values are also lists in ``results.json``.
    """

    prefix, metrics = "unseen_gradient", ("share", "relative")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._layers: list[Layer] = []
        self._last = 0  # optimizer step of the micro-batch before

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what has no LoRA, and compiled blocks."""
        if not self.every_n_steps:
            return
        task = own_module(pl_module).objective
        adapter, start = task.adapter, task.start
        kept = start is not None and start.form == "beside"  # the LoRA is a part as soon as the model is built
        if not (kept or any(part.trains_factors for part in getattr(adapter, "parts", [adapter]))):
            raise UserError(
                f"unseen_gradient.every_n_steps measures LoRA, and {adapter.method()} has none. Remove the option, or "
                "set --model.adapter LoRA."
            )
        if task.torch_compile:
            raise UserError("unseen_gradient.every_n_steps does not see compiled blocks. Remove --model.torch_compile.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Listen to the layers in the first micro-batch of a step that is due."""
        step, before = trainer.global_step + 1, self._last
        self._last = step
        if not self.every_n_steps or step == before or not trainer.is_global_zero:
            return
        if step % self.every_n_steps == 0 or step == total_steps(trainer):
            self._layers = layers_of(own_module(pl_module).objective.model)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the share, and listen no more."""
        layers = self._stop()
        unseen, random, whole = (
            sum(getattr(layer, name) for layer in layers) for name in ("unseen", "random", "whole")
        )
        if not 0 < whole < math.inf:  # nothing was due, or float16 overflowed
            return
        relative = unseen / random if random else 0.0  # 0: LoRA of full rank
        self.record(trainer, trainer.global_step + 1, {"share": unseen / whole, "relative": relative})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Listen no more."""
        self._stop()

    def _stop(self) -> list["Layer"]:
        """Give the updates their own methods back."""
        layers, self._layers = self._layers, []
        for layer in layers:
            del layer.update.add, layer.update.contribution
        return layers


def layers_of(model: nn.Module) -> list["Layer"]:
    """Listen to the weights to which linear or attention layers apply a LoRA, alone or as a part of a sum."""
    layers = []
    for layer in model.modules():
        if isinstance(layer, AdaptedLayer) and not isinstance(layer, BuiltWeight) and layer.delta is not None:
            for update in layer.delta.blocks().values() if isinstance(layer.delta, RowBlocks) else [layer.delta]:
                for part in (update, *getattr(update, "parts", ())):
                    if isinstance(part, FactoredDelta) and part.trains_factors:
                        layers.append(Layer(update, part))
                        break
    return layers


class Layer:
    """Listener of one weight: the two matrices of its LoRA, and the gradient of the weight during a backward pass.

    Attributes:
        unseen: Squared norm of the unseen gradient.
        random: Squared norm of a random gradient's unseen part.
        whole: Squared norm of the whole gradient.
    """

    def __init__(self, update: DeltaWeight, lora: FactoredDelta) -> None:
        self.update, self.lora = update, lora
        self._gradient: Tensor | None = None
        self._uses = self._inside = 0
        self.unseen = self.whole = self.random = 0.0
        for name in ("add", "contribution"):
            setattr(update, name, partial(self._listen, getattr(update, name)))

    def _listen(self, apply: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
        """Apply the update, and wait for the gradient of its outputs, which is the layer's."""
        self._inside += 1
        outputs = apply(x, *rest)
        self._inside -= 1
        again = torch._C._current_graph_task_id() != -1  # recomputed in a backward pass, whose outputs have no gradient
        if not (self._inside or again) and outputs.requires_grad:
            self._uses += 1
            outputs.register_hook(partial(self._add, x.detach()))  # type: ignore[no-untyped-call]
        return outputs

    def _add(self, x: Tensor, gradient: Tensor) -> None:
        """Add the part of one use of the layer; after the last one, measure."""
        if "add" not in vars(self.update):  # stopped before the last micro-batch, in which shared texts are
            return
        with torch.no_grad(), without_autocast(x):
            part = _rows(gradient).T @ _rows(x)
            self._gradient = part if self._gradient is None else self._gradient.add_(part)
            self._uses -= 1
            if self._uses:
                return
            whole, self._gradient = self._gradient, None
            self.whole += float(whole.square().sum())
            b, a = self.lora.factors()
            if not all(bool(each.isfinite().all()) for each in (whole, b, a)):
                self.whole = math.nan  # nothing is logged, and a run that diverged ends with an error of its own
                return
            left, right = _span(b), _span(a.T)
            rest = whole - left @ (left.T @ whole)
            rest -= (rest @ right) @ right.T
            self.unseen += float(rest.square().sum())
            rows, columns = whole.shape
            self.random = self.whole * (1 - left.shape[1] / rows) * (1 - right.shape[1] / columns)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).float()


def _span(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns of a matrix (n, r), in float32; empty for zeros, as B at the start."""
    left, values, _ = torch.linalg.svd(matrix.to("cpu", torch.float64), full_matrices=False)  # not every GPU has it
    columns: Tensor = left[:, values > 1e-6 * values.max().clamp_min(1e-30)]
    return columns.to(matrix.device, torch.float32)


class UpdateSpectrum(_Measured):
    """Log rank, stable rank, effective rank and norm of the updates, averaged over layers, as ``spectrum/...``.

    Compare Table 2 of the paper. The values are logged, and written as lists with ``spectrum/steps`` to
    ``results.json``. Each measurement takes a singular value decomposition of every layer.
    """

    prefix, metrics = "spectrum", ("rank", "stable_rank", "effective_rank", "norm")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse methods whose update depends on the input, before anything runs."""
        if not self.every_n_steps:
            return
        adapter = own_module(pl_module).objective.adapter
        if not adapter.fixed:
            raise UserError(
                f"spectrum.every_n_steps: the update of {adapter.method()} depends on the input, so it is "
                "not a matrix and has no spectrum. Remove the option."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the initial weights for methods without updates; measure if the checkpoint precedes a due spectrum."""
        step = self._last = trainer.global_step
        self._start: dict[str, Tensor] = {}
        self._off = False  # True if the initial weights are unknown
        if not self.every_n_steps:
            return
        if any(hasattr(parameter, "full_tensor") for parameter in pl_module.parameters()):
            raise UserError("spectrum.every_n_steps needs complete weights. Remove it, or --trainer.strategy fsdp2.")
        task = own_module(pl_module).objective
        if task.report.adapter.trains_base and step:
            log.warning("no spectra of the updates: a resumed run does not have the weights that it started from")
            self._off = True
        elif task.report.adapter.trains_base:
            self._start = {name: weight.detach().clone() for name, weight in _matrices(task.model).items()}
        if step and step % self.every_n_steps == 0 and step not in self.history["steps"]:
            self._take(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Measure every ``every_n_steps`` optimizer steps."""
        step = trainer.global_step
        if self.every_n_steps and step != self._last and step % self.every_n_steps == 0:
            self._take(trainer, pl_module)
        self._last = step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final updates."""
        if self.every_n_steps and trainer.global_step and trainer.global_step not in self.history["steps"]:
            self._take(trainer, pl_module)

    @torch.no_grad()
    def _take(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means of all updates, unless one is not finite, which other callbacks report."""
        if not trainer.is_global_zero or self._off:
            return
        model = own_module(pl_module).objective.model
        if self._start:
            trained = _matrices(model)
            updates = {name: trained[name] - before for name, before in self._start.items()}
        else:
            updates = delta_weights(model)
        if updates and all(bool(update.isfinite().all()) for update in updates.values()):
            spectra = [spectrum(update) for update in updates.values()]
            means = {name: sum(float(getattr(one, name)) for one in spectra) / len(spectra) for name in self.metrics}
            self.record(trainer, trainer.global_step, means)


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    """Return the trainable weights of linear and attention layers, (out, in)."""
    weights: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        packed = isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
        weight: Any = module.in_proj_weight if packed else module._parameters.get("weight")
        if (packed or out_and_in(module)) and weight is not None and weight.requires_grad:
            weights[path] = weight_of(module)
    return weights
