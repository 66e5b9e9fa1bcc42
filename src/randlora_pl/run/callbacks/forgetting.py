"""The guard against forgetting: the scale s of W0 + s (W - W0) that a run ends with.

Ilharco et al., Patching open-vocabulary models by interpolating weights (PAINT), arXiv 2208.05592: of a grid of scales,
the one with the largest mean of two validation accuracies, on the task and on what is to be kept. WiSE-FT has the
interpolation (Wortsman et al., arXiv 2109.01903).
"""

from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from randlora_pl.adapters import load_adapter
from randlora_pl.adapters.adapter_file import adapter_state
from randlora_pl.adapters.operations import report_of, unmerge
from randlora_pl.adapters.trained import moved_buffers
from randlora_pl.data import ImageData
from randlora_pl.data.base import PlannedData
from randlora_pl.data.unlabelled import batches, random_samples
from randlora_pl.interop.base_model import interpolate
from randlora_pl.models import load_clip
from randlora_pl.run.callbacks.evaluation import check_names_others, other_data
from randlora_pl.tasks.images import ClipTask
from randlora_pl.tasks.objective import Objective
from randlora_pl.utils.errors import UserError

SCALES = tuple(step / 10 for step in range(11))
MOST_IMAGES = 2_000
"""Validation images of either set, a random choice that is the same in all runs: a standard error of 1.1 points."""


def check_options(scale: str | None, task: Objective, data: PlannedData, sharded: bool) -> None:
    """Refuse a guard that has nothing to keep, or that cannot scale or measure it, before a model is built."""
    keep, adapter, option = getattr(data, "keep", None), task.adapter, "--checkpoint.scale auto"
    check_names_others(task, option)
    if scale is None or keep is None:
        what = "the name of another dataset, or new with --data.classes base"
        raise UserError(f"{option} and --data.keep ({what}) need each other. Set both, or remove both.")
    if not (adapter.proportional_to or (adapter.trains_base and adapter.updates)):
        raise UserError(
            f"{option}: no multiple of the update of {adapter.method()} is another {adapter.method()}. Choose another "
            "method such as RandLoRA, or merge with a scale of your own: randlora-pl adapter merge --scale"
        )
    if sharded:
        raise UserError(f"{option} needs the whole model in each process. Use --trainer.strategy ddp, or remove it.")


def kept_data(own: ImageData) -> ImageData:
    """Return the data to keep, after `check_options`; refuse if it or the task's own has no validation images."""
    assert own.keep is not None and own.found is not None
    if own.trains_on_val or not len(own.found.val):
        why = "chooses the scale on validation images, and this run has none"
        raise UserError(f"--checkpoint.scale auto {why}. Set --data.train_split train, or add images.")
    kept = other_data(own, own.keep, own.templates)
    kept.setup("validate")
    return kept


class Scaled:
    """The state of a task that has been trained, at any scale of its update.

    The tensors that an update is proportional to (`Adapter.proportional_to`) lie between 0 and their trained values,
    the model's own tensors between their values before and after the training. So files need no scale.
    """

    def __init__(self, task: ClipTask) -> None:
        model, state = task.model, adapter_state(task.model)
        ends = tuple(f".{name}" for name in task.adapter.proportional_to)
        factors = {name: tensor for name, tensor in state.updates.items() if name.endswith(ends)}
        before = dict(report_of(model).buffers) | {name: torch.zeros_like(factors[name]) for name in factors}
        if state.own:
            before |= load_clip(task.name, task.pretrained, seed=task.seed).model.state_dict()
        changed: dict[str, Tensor] = {**factors, **state.own, **moved_buffers(model)}
        self.ends = [(each, before[name].to(each), each.detach().clone()) for name, each in changed.items()]

    @torch.no_grad()
    def use(self, scale: float) -> None:
        """Set W0 + s (W - W0)."""
        for tensor, frozen, trained in self.ends:
            tensor.copy_(interpolate(frozen, trained, scale))


def best_scale(accuracies: dict[float, tuple[float, float]]) -> float:
    """Return the scale with the largest mean of two accuracies; of equals the smallest."""
    return max(sorted(accuracies), key=lambda scale: round(sum(accuracies[scale]), 9))


def choose_scale(trainer: Trainer, task: Objective, kept: ImageData, best: Path | None) -> dict[str, Any]:
    """Scale the update of a run by the best scale on validation images; all processes take the same one.

    The last weights are scaled, or the ones in the folder ``best``. The entries for ``results.json`` are the scale, and
    both accuracies there, at 0 and at 1.
    """
    task, own = cast(ClipTask, task), cast(ImageData, trainer.datamodule)  # type: ignore[attr-defined]
    unmerge(task.model)
    if best is not None:
        task.load_head(load_adapter(task.model, best).extra)
    task.use_sum({}, "")  # the class features of a file are another scale's
    images = [(data, random_samples(data.samples("val"), MOST_IMAGES, 0)) for data in (own, kept)]
    scaled, training, accuracies = Scaled(task), task.training, dict[float, tuple[float, float]]()
    task.eval()
    for scale in SCALES:
        scaled.use(scale)
        task.prepare_evaluation()
        found = []
        for data, samples in images:
            loaded = batches(data, samples, own.eval_batch_size, task.device)
            with torch.no_grad(), task.run.autocast():
                percent, _ = task.percent_among(data.classnames, loaded, templates=data.templates)
            found.append(percent / 100)
        task.finish_evaluation()
        accuracies[scale] = found[0], found[1]
    chosen: float = task.run.broadcast(best_scale(accuracies))
    scaled.use(chosen)
    task.train(training)
    facts: dict[str, Any] = {"scale": chosen, "scale/kept_data": own.keep}
    for number, name in enumerate(("own", "kept")):
        facts[f"scale/{name}"] = accuracies[chosen][number]
        facts |= {f"scale/{name}_at_{scale:.0f}": accuracies[scale][number] for scale in (0.0, 1.0)}
        facts[f"scale/{name}_images"] = len(images[number][1])
    return facts
