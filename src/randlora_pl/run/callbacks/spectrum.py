"""Rank of the updates during training (compare Table 2 of the paper)."""

import logging
from typing import Annotated, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from randlora_pl.adapters.layers.weight_access import out_and_in, weight_of
from randlora_pl.adapters.operations import delta_weights
from randlora_pl.adapters.spectrum import Spectrum, spectrum
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.run_files import run_folder
from randlora_pl.utils.options import Declared, NotNegative
from randlora_pl.utils.run_results import write_results

_log = logging.getLogger("randlora_pl")
METRICS = ("rank", "stable_rank", "effective_rank", "norm")


class UpdateSpectrum(Declared, Callback):
    """Log rank, stable rank, effective rank and norm of the updates, averaged over layers, as ``spectrum/...``.

    The values are logged, and written as lists with ``spectrum/steps`` to ``results.json``. Each measurement takes a
    singular value decomposition of every layer.
    """

    every_n_steps: Annotated[int, NotNegative] = 0
    """Optimizer steps between two spectra; the last step is always measured. 0 disables it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.history: dict[str, list[float]] = {name: [] for name in ("steps", *METRICS)}
        self._start: dict[str, Tensor] = {}
        self._last = -1
        self._off = False  # True if the initial weights are unknown

    def state_dict(self) -> dict[str, Any]:
        """Return the values so far."""
        return {"history": {name: list(values) for name, values in self.history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the values of the resumed run."""
        self.history = {name: list(state_dict["history"][name]) for name in self.history}

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse methods whose update depends on the input, before anything runs."""
        if self.every_n_steps and not pl_module.adapter.fixed:
            raise UserError(
                f"spectrum.every_n_steps: the update of {pl_module.adapter.method()} depends on the input, so it is "
                "not a matrix and has no spectrum. Remove the option."
            )

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Keep the initial weights for methods without updates; measure if the checkpoint precedes a due spectrum."""
        step = self._last = trainer.global_step
        if not self.every_n_steps:
            return
        if any(hasattr(parameter, "full_tensor") for parameter in pl_module.parameters()):
            raise UserError("spectrum.every_n_steps needs complete weights. Remove it, or --trainer.strategy fsdp2.")
        if pl_module.report.adapter.trains_base and step:
            _log.warning("no spectra of the updates: a resumed run does not have the weights that it started from")
            self._off = True
        elif pl_module.report.adapter.trains_base:
            self._start = {name: weight.detach().clone() for name, weight in _matrices(pl_module.model).items()}
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

    def _take(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = _spectra(pl_module, self._start) if trainer.is_global_zero and not self._off else []
        if not found:
            return
        means = {name: sum(float(getattr(one, name)) for one in found) / len(found) for name in METRICS}
        self.history["steps"].append(trainer.global_step)
        for name, value in means.items():
            self.history[name].append(round(value, 4))
        for logger in trainer.loggers:  # the module's own log skips steps
            logger.log_metrics({f"spectrum/{name}": value for name, value in means.items()}, step=trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the values to the run's results."""
        if trainer.is_global_zero and self.history["steps"]:
            write_results(run_folder(trainer), {f"spectrum/{name}": values for name, values in self.history.items()})


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    """Return the trainable weights of linear and attention layers, (out, in)."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        packed = isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
        weight: Any = module.in_proj_weight if packed else module._parameters.get("weight")
        if (packed or out_and_in(module)) and weight is not None and weight.requires_grad:
            found[path] = weight_of(module)
    return found


@torch.no_grad()
def _spectra(task: Any, start: dict[str, Tensor]) -> list[Spectrum]:
    """Return the spectrum of every update; empty if one is not finite, which other callbacks report."""
    trained = _matrices(task.model)
    updates = {name: trained[name] - before for name, before in start.items()} if start else delta_weights(task.model)
    finite = all(bool(update.isfinite().all()) for update in updates.values())
    return [spectrum(update) for update in updates.values()] if finite else []
