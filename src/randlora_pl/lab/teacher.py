"""The teacher task: an image tower follows a copy of itself, in which an update of a known spectrum is planted.

With the singular values s of the spectrum, and orthonormal U and V, each adapted weight of the teacher is

    W = W0 + size ||W0||_F U diag(s) V^T / ||s||.

A student that starts at W0 shows how much of such an update a method learns from images, without their labels.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from randlora_pl.adapters import read_adapter
from randlora_pl.adapters.random_bases import Distribution, draw
from randlora_pl.adapters.select import select
from randlora_pl.adapters.sites import weight_key
from randlora_pl.interop.base_model import rows_of
from randlora_pl.models import ImageTower, load_clip
from randlora_pl.tasks.images import ImageTask, normalize
from randlora_pl.tasks.measures import LOSS, Measure
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.options import NotNegative, Positive

POWERS = {"flat": 0.0, "i^-0.5": -0.5, "i^-1": -1.0}
"""Exponents of the spectra that have a formula: the i-th singular value is i to this power."""


def planted(weight: Tensor, values: Tensor, size: float, seed: int, layer: str) -> Tensor:
    """Return the update (out, in) of a weight with relative singular values; in one thread it has the same bits."""
    left, right = (_directions(seed, f"{layer} {side}", rows, len(values)) for side, rows in enumerate(weight.shape))
    scale = size * weight.double().norm() / values.norm()
    update: Tensor = left * (scale * values) @ right.T
    return update.to(weight)


def _directions(seed: int, name: str, rows: int, columns: int) -> Tensor:
    """Return random orthonormal columns (rows, columns), float64, uniform over all such matrices."""
    normal = draw(seed, f"teacher {name}", 1, rows, columns, Distribution("normal"), torch.device("cpu"))[0].double()
    basis, triangle = torch.linalg.qr(normal)
    directions: Tensor = basis * triangle.diagonal().sign()
    return directions


def mean_spectrum(spectra: Sequence[Tensor], count: int) -> Tensor:
    """Return the mean of several spectra of norm 1, each stretched to ``count`` singular values, float64."""
    stretched = [nn.functional.interpolate(each.double()[None, None], count, mode="linear", align_corners=True)[0, 0]
                 for each in spectra]  # fmt: skip
    return torch.stack([each / each.norm() for each in stretched]).mean(0)


def learned_spectra(path: str, layers: Sequence[str]) -> list[Tensor]:
    """Return the singular values of the updates of a full fine-tuning, of these layers if it has any of them."""
    from randlora_pl.lab.analysis.weights import layer_spectrum, matrix_updates  # matplotlib takes its time

    file = read_adapter(path)
    if file.adapter.freezes:
        raise UserError(f"{path} was trained with {file.adapter.method()}. Give a run of FullFineTuning.")
    updates = matrix_updates(file)
    chosen = [layer for layer in layers if layer in updates] or [*updates]
    spectra = [layer_spectrum(layer, updates[layer]).values for layer in chosen]
    if not (changed := [values for values in spectra if values[0] > 0]):
        raise UserError(f"{path} changes no matrix of a layer, so it has no spectrum.")
    return changed


class TeacherTask(ImageTask):
    """Makes an image tower follow a teacher: a copy of it with a planted update of full rank in the adapted layers.

    The loss of an image is the squared distance of both towers' features, of unit length as CLIP compares them.
    """

    measures = (Measure("score", "share learned"), LOSS)
    has_classes = False
    vision_only = True
    shares_features = False
    answer = "distance"
    loss_note = "the squared distance of unit features to the teacher's: 0 is a perfect student"

    spectrum: str = "flat"
    """Singular values of the planted update: ``flat``, ``i^-0.5``, ``i^-1``, or a run or an adapter of full
    fine-tuning, whose mean over the layers is taken."""
    size: Annotated[float, Positive] = 0.1
    """Frobenius norm of the planted update, relative to the norm of each weight."""
    teacher_seed: Annotated[int, NotNegative] = 0
    """Selects the directions of the planted update, and the weights of a random model. The seed of the run does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        path = Path(self.spectrum)
        if self.spectrum not in POWERS and path.name == self.spectrum and not path.exists():
            raise UserError(
                f"--model.spectrum {brief(self.spectrum)}: give {', '.join(POWERS)} or a run of full fine-tuning."
            )
        self._towers: tuple[nn.Module, ...] = ()  # a tuple hides them from optimizers, counts and checkpoints

    def build(self) -> nn.Module:
        """Load the student, and make the teacher and the base model of copies."""
        clip = load_clip(self.name, self.pretrained, seed=self.teacher_seed)
        student, self.identity = ImageTower(clip.model), clip.identity
        base, teacher = (copy.deepcopy(student).eval().requires_grad_(False) for _ in range(2))
        sites, state = select(teacher, self.targets, split=False), teacher.state_dict()  # the same for all methods
        layers = [site.shape.layer for site in sites]
        spectra = [] if self.spectrum in POWERS else learned_spectra(self.spectrum, layers)
        with rng.seeded(0):  # one thread
            for site in sites:
                weight = rows_of(state[weight_key(teacher, site)], site)  # a view
                places = torch.arange(1, min(weight.shape) + 1, dtype=torch.float64)
                values = mean_spectrum(spectra, len(places)) if spectra else places ** POWERS[self.spectrum]
                weight += planted(weight, values, self.size, self.teacher_seed, site.shape.layer)
        self._towers = teacher, base
        return student

    def build_on(self, other: ImageTask) -> None:
        """Make the teacher for a student that is built."""
        self.build()

    def class_logits(self, images: Tensor) -> Tensor:
        """Return the loss of each image (b, 1), in an evaluation with the base model's next to it, (b, 2)."""
        features = [self.noted(self.model(images))]
        with torch.no_grad():
            teacher, *base = [tower.to(images.device)(images) for tower in self._towers[: 1 if self.training else 2]]
        return torch.stack([(normalize(each) - normalize(teacher)).square().sum(1) for each in features + base], dim=1)

    def output_loss(self, outputs: Tensor, labels: Tensor, reduction: str = "none") -> Tensor:
        """Return the squared distances to the teacher."""
        return outputs[:, 0].sum() if reduction == "sum" else outputs[:, 0]

    def make_metrics(self) -> dict[str, Metric]:
        """Return the share of the base model's loss that is gone: 1 is a perfect student, the base model has 0."""
        return {"score": MeanMetric()}

    def compared(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the share of each image, and the base model's loss, which weighs it."""
        return 1 - outputs[:, 0] / outputs[:, 1], outputs[:, 1]
