"""The loss on the plane through three trained models (Figures 4b and 5 of the paper; Garipov et al., 2018).

A point of the plane has the weights a_1 theta_1 + a_2 theta_2 + a_3 theta_3 with a_1 + a_2 + a_3 = 1, where theta_i
are all weights of a model with its update merged, so that adapters of any method and full fine-tuning lie on one plane.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_pl.adapters.operations import unload
from randlora_pl.utils.errors import UserError

Point = tuple[float, float]
State = dict[str, Tensor]

POSITIONS: dict[str, tuple[Point, Point, Point]] = {
    "paper": ((0.0, 0.0), (1.0, 0.0), (0.5, 1.0)),
    "equilateral": ((0.0, 0.0), (1.0, 0.0), (0.5, 3**0.5 / 2)),
}
"""Where the three models are drawn: section 6.2 says the first, appendix A ("equidistant") the second."""
ABOVE = 1.2
"""Losses are drawn up to this multiple of the shallowest minimum's (appendix A: 20 % above it)."""


def coefficients(x: float, y: float, corners: Sequence[Point]) -> tuple[float, float, float]:
    """The weights (a_1, a_2, a_3) of three points in the plane that give (x, y); their sum is 1.

    At a corner they are exactly 1, 0 and 0.
    """
    (x1, y1), (x2, y2), (x3, y3) = corners
    area = (x2 - x1) * (y3 - y1) - (x3 - x1) * (y2 - y1)
    second = ((x - x1) * (y3 - y1) - (x3 - x1) * (y - y1)) / area
    third = ((x2 - x1) * (y - y1) - (x - x1) * (y2 - y1)) / area
    return 1 - second - third, second, third


def weights_of(task: Any) -> State:
    """The tensors of a task that is ready to predict: those of its backbone, with the update merged, and of its head.

    The backbone loses its adapter and becomes plain layers; the tensors are the module's own, not copies.
    """
    unload(task.model)
    tensors: State = {name: value.detach() for name, value in task.model.state_dict().items()}
    return tensors | {f"head/{name}": value.detach() for name, value in task.head_tensors().items()}


class Plane:
    """Writes the weights of any point of the plane into one model, in place.

    Args:
        target: Tensors to write into, by name: those of a model that is used afterwards.
        states: The weights of the three models, of the same names and shapes; none of them shares memory with
            ``target``.
        corners: Where the models lie.

    Raises:
        UserError: The models have other tensors.
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
        # What does not differ need not be written again; integers such as token positions never do.
        self._moving = [(target[name], [state[name] for state in states]) for name in target if name not in set(same)]

    @classmethod
    def through(cls, tasks: Sequence[Any], corners: Sequence[Point]) -> "Plane":
        """The plane through three tasks that are ready to predict; its points are written into the first of them.

        All three lose their adapters and become plain layers with the update merged.

        Raises:
            UserError: The models have other tensors.
        """
        target, *others = (weights_of(task) for task in tasks)
        return cls(target, [{name: value.clone() for name, value in target.items()}, *others], corners)

    @torch.no_grad()
    def go(self, x: float, y: float) -> None:
        """Gives the model the weights of a point."""
        shares = coefficients(x, y, self.corners)
        for target, values in self._moving:
            torch.mul(values[0], shares[0], out=target)
            for value, share in zip(values[1:], shares[1:], strict=True):
                target.add_(value, alpha=share)

    def distances(self) -> dict[str, float]:
        """Euclidean distances between the models' weights, by the numbers of the two: ``1-2``, ``1-3``, ``2-3``."""
        pairs = {"1-2": (0, 1), "1-3": (0, 2), "2-3": (1, 2)}
        return {
            name: sum(float((v[i].double() - v[j].double()).square().sum()) for _, v in self._moving) ** 0.5
            for name, (i, j) in pairs.items()
        }


@torch.inference_mode()
def loss(task: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean cross-entropy over all classes of a task on images (b, 3, H, W) with labels (b,).

    Infinity where the model's weights are so far out that it is not a number.
    """
    task.prepare_evaluation()  # forgets text features of other weights
    total, count = 0.0, 0
    for images, labels in batches:
        logits = task.class_logits(images).float()
        total += float(F.cross_entropy(logits, labels, reduction="sum").double())
        count += len(labels)
    mean = total / max(1, count)
    return mean if mean == mean else float("inf")


@dataclass(frozen=True)
class Grid:
    """The points at which the loss is taken: a square that contains the triangle of the three models.

    Attributes:
        size: Points along each side.
        margin: How far the square from 0 to 1 is extended to every side.
    """

    size: int = 25
    margin: float = 0.7

    @property
    def values(self) -> list[float]:
        """The ``size`` coordinates along x and along y; with the defaults the paper's corners are among them."""
        step = (1 + 2 * self.margin) / (self.size - 1)
        return [round(number * step - self.margin, 10) for number in range(self.size)]

    def nearest(self, point: Point) -> tuple[int, int]:
        """Row (along y) and column (along x) of the grid point next to a point."""
        column, row = (min(range(self.size), key=lambda n: abs(self.values[n] - value)) for value in point)
        return row, column
