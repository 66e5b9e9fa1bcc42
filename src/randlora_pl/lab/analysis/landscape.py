"""Loss on the plane through three trained models (Figures 4b and 5 of the paper; Garipov et al., 2018).

A point of the plane has the weights a_1 theta_1 + a_2 theta_2 + a_3 theta_3 with a_1 + a_2 + a_3 = 1, where theta_i
are all weights of model i with its update merged, so that adapters of any method and full fine-tuning fit on one plane.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_pl.adapters.input_dependent import check_fixed
from randlora_pl.adapters.operations import merge_and_unload
from randlora_pl.data import ImageData
from randlora_pl.data.readers.dispatch import Samples
from randlora_pl.data.sampling.splits import stratified
from randlora_pl.utils.errors import UserError

Point = tuple[float, float]
State = dict[str, Tensor]

POSITIONS: dict[str, tuple[Point, Point, Point]] = {
    "paper": ((0.0, 0.0), (1.0, 0.0), (0.5, 1.0)),
    "equilateral": ((0.0, 0.0), (1.0, 0.0), (0.5, 3**0.5 / 2)),
}
"""Positions of the three models: the first as in section 6.2, the second as in appendix A ("equidistant")."""
ABOVE = 1.2
"""Upper limit of plotted losses, as a multiple of the highest loss of the three models (appendix A: 20 % above)."""


def coefficients(x: float, y: float, corners: Sequence[Point]) -> tuple[float, float, float]:
    """Return the barycentric coordinates (a_1, a_2, a_3) of (x, y); their sum is 1.

    At a corner they are exactly 1, 0 and 0.
    """
    (x1, y1), (x2, y2), (x3, y3) = corners
    area = (x2 - x1) * (y3 - y1) - (x3 - x1) * (y2 - y1)
    second = ((x - x1) * (y3 - y1) - (x3 - x1) * (y - y1)) / area
    third = ((x2 - x1) * (y - y1) - (x - x1) * (y2 - y1)) / area
    return 1 - second - third, second, third


def weights_of(task: Any) -> State:
    """Return the tensors of a task's backbone, with the update merged, and of its head.

    The backbone is unloaded to plain layers. The tensors are not copied.

    Raises:
        UserError: The update depends on the input, so no weights contain it.
    """
    check_fixed(task.adapter, "analyze landscape")
    merge_and_unload(task.model)
    tensors: State = {name: value.detach() for name, value in task.model.state_dict().items()}
    return tensors | {f"head/{name}": value.detach() for name, value in task.head_tensors().items()}


class Plane:
    """Plane through three models, whose points are written into one model in place.

    Args:
        target: Tensors of the model to write into, by name.
        states: Weights of the three models with the same names and shapes; none shares memory with ``target``.
        corners: Positions of the three models.

    Raises:
        UserError: The models have different tensors.
    """

    def __init__(self, target: State, states: Sequence[Mapping[str, Tensor]], corners: Sequence[Point]) -> None:
        shapes = [{name: tuple(value.shape) for name, value in state.items()} for state in (target, *states)]
        if any(other != shapes[0] for other in shapes[1:]):
            other = next(each for each in shapes[1:] if each != shapes[0])
            differing = sorted(n for n in shapes[0].keys() | other.keys() if shapes[0].get(n) != other.get(n))
            raise UserError(f"the models differ in {len(differing)} tensors such as {differing[0]}: no plane has both.")
        self.corners = tuple(corners)
        same = [name for name in target if all(torch.equal(states[0][name], state[name]) for state in states[1:])]
        for name in same:
            target[name].copy_(states[0][name])
        # Equal tensors are written once; integer tensors such as token positions never differ.
        self._moving = [(target[name], [state[name] for state in states]) for name in target if name not in set(same)]

    @classmethod
    def through(cls, tasks: Sequence[Any], corners: Sequence[Point]) -> "Plane":
        """Create the plane through three tasks, which are unloaded; its points are written into the first task."""
        target, *others = (weights_of(task) for task in tasks)
        return cls(target, [{name: value.clone() for name, value in target.items()}, *others], corners)

    @torch.no_grad()
    def write_point(self, x: float, y: float) -> None:
        """Write the weights of a point into the model."""
        factors = coefficients(x, y, self.corners)
        for target, values in self._moving:
            torch.mul(values[0], factors[0], out=target)
            for value, factor in zip(values[1:], factors[1:], strict=True):
                target.add_(value, alpha=factor)

    def distances(self) -> dict[str, float]:
        """Return the Euclidean distances between the models' weights, by pair: ``1-2``, ``1-3``, ``2-3``."""
        pairs = {"1-2": (0, 1), "1-3": (0, 2), "2-3": (1, 2)}
        return {
            name: sum(float((v[i].double() - v[j].double()).square().sum()) for _, v in self._moving) ** 0.5
            for name, (i, j) in pairs.items()
        }


@torch.inference_mode()
def loss(task: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return a task's mean cross-entropy over all classes on images (b, 3, H, W) with labels (b,); infinity for NaN."""
    task.prepare_evaluation()  # discards text features of other weights
    total, count = 0.0, 0
    for images, labels in batches:
        logits = task.class_logits(images).float()
        total += float(F.cross_entropy(logits, labels, reduction="sum").double())
        count += len(labels)
    mean = total / max(1, count)
    return mean if mean == mean else float("inf")


@dataclass(frozen=True)
class Grid:
    """Square grid that contains the triangle of the three models.

    Attributes:
        size: Points per side.
        margin: Extension of the square from 0 to 1 on every side.
    """

    size: int = 25
    margin: float = 0.7

    @property
    def values(self) -> list[float]:
        """The ``size`` coordinates, equal for x and y; by default they contain the paper's corners."""
        step = (1 + 2 * self.margin) / (self.size - 1)
        return [round(number * step - self.margin, 10) for number in range(self.size)]

    def nearest(self, point: Point) -> tuple[int, int]:
        """Return the row (along y) and column (along x) of the nearest grid point."""
        column, row = (min(range(self.size), key=lambda n: abs(self.values[n] - value)) for value in point)
        return row, column


def stratified_fraction(samples: Samples, fraction: float, seed: int) -> Samples:
    """Return a stratified fraction of the samples, at least one; only seed and sample keys decide."""
    total = max(1, round(fraction * len(samples)))
    return samples.subset(stratified(samples.labels, samples.numbers, total, seed, "analysis"))


def check_classes(data: ImageData, classnames: list[str]) -> None:
    """Raise a `UserError` if the data has captions, or other classes than the model."""
    if data.row.captions:
        raise UserError(f"{data.row.name} has captions, not classes. Set a dataset with classes: --dataset NAME")
    if data.classnames != classnames:
        raise UserError(
            f"{data.row.name} has {len(data.classnames)} classes ({data.classnames[:3]} ...), but the model has "
            f"{len(classnames)} others ({classnames[:3]} ...). Set its dataset: --dataset NAME"
        )
