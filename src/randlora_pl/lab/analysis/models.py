"""Comparison of whole models: similarity of activations by layer, and the loss between three models.

The similarity (Figure 4a of the paper) is linear centered kernel alignment (CKA),

    CKA = sum_i HSIC_1(K_i, L_i) / sqrt(sum_i HSIC_1(K_i, K_i) * sum_i HSIC_1(L_i, L_i))

over minibatches i, with K = X X^T and L = Y Y^T of the activations of the same images (Kornblith et al., 2019;
Nguyen et al., 2021, equation 3). HSIC_1 is the unbiased estimator of Song et al. (2012, equation 5), so that the
expected value does not depend on the batch size. The paper does not specify the kernel, the number of images, or the
treatment of tokens. Here the activations of all tokens of an image are concatenated.

The loss is on the plane through three trained models (Figures 4b and 5; Garipov et al., 2018). A point of the plane
has the weights a_1 theta_1 + a_2 theta_2 + a_3 theta_3 with a_1 + a_2 + a_3 = 1, where theta_i are all weights of model
i with its update merged, so that adapters of any method and full fine-tuning fit on one plane.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import product
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from randlora_pl.adapters.operations import merge_and_unload
from randlora_pl.data import ImageData
from randlora_pl.data.readers import Samples
from randlora_pl.data.splits import stratified
from randlora_pl.lab.analysis.figures import colors, footnote, legend, new_figure
from randlora_pl.models.execution import repeated_blocks
from randlora_pl.tasks import ImageTask
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.text import for_figure

FEWEST = 4
"""Minimum batch size, because HSIC_1 divides by n (n - 3)."""
KINDS = {"attention": ("attn", "self_attn", "attention"), "mlp": ("mlp", "ffn")}
"""Compared parts of each block, with their names in open_clip, timm and transformers."""

Layer = tuple[int, str]
"""Number of the block, and ``attention`` or ``mlp``."""


def gram(features: Tensor) -> Tensor:
    """Return the linear kernel X X^T (n, n) of activations (n, ...), in float64."""
    x = features.detach().flatten(1)
    x = (x.cpu() if x.device.type == "mps" else x).double()  # MPS has no float64
    return x @ x.T


def hsic1(k: Tensor, m: Tensor) -> Tensor:
    """Return the unbiased Hilbert-Schmidt independence criterion of two kernels (n, n), n >= 4; may be negative."""
    n = len(k)
    k, m = k - k.diag().diag(), m - m.diag().diag()
    whole = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return ((k * m).sum() + whole - 2 * (k.sum(0) @ m.sum(0)) / (n - 2)) / (n * (n - 3))


@dataclass
class MinibatchCKA:
    """Sums of HSIC_1 over minibatches; `value` is their CKA.

    Attributes:
        sums: HSIC_1 of (K, L), (K, K) and (L, L), float64.
    """

    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    def update(self, k: Tensor, m: Tensor) -> None:
        """Add the kernels (n, n) of one minibatch of at least four images."""
        self.sums = self.sums + torch.stack([hsic1(k, m), hsic1(k, k), hsic1(m, m)]).cpu()

    @property
    def value(self) -> float:
        """CKA: 1 if the activations differ by rotation and scale only, NaN if one of them is constant."""
        cross, one, other = self.sums.tolist()
        return float(cross / (one * other) ** 0.5) if one > 0 and other > 0 else float("nan")


def vision_layers(model: nn.Module) -> dict[Layer, nn.Module]:
    """Return the attention and MLP layers of every block of the image tower, in order.

    Raises:
        UserError: The model has no such layers.
    """
    blocks = repeated_blocks(model)
    if any(path.startswith("visual.") for path in blocks):  # CLIP: exclude the text tower
        blocks = {path: block for path, block in blocks.items() if path.startswith("visual.")}
    layers: dict[Layer, nn.Module] = {}
    for number, block in enumerate(blocks.values()):
        for kind, names in KINDS.items():
            layer = next((child for name, child in block.named_children() if name in names), None)
            if layer is not None:
                layers[number, kind] = layer
    if not layers:
        raise UserError("the model has no blocks with attention and MLP layers. CKA needs a transformer.")
    return layers


@contextmanager
def outputs(layers: Mapping[Layer, nn.Module]) -> Iterator[dict[Layer, Tensor]]:
    """Record the last output of each layer inside the block, (b, ...)."""
    seen: dict[Layer, Tensor] = {}

    def keep(name: Layer, layer: nn.Module, inputs: Any, output: Any) -> None:
        tensor: Tensor = output[0] if isinstance(output, tuple) else output
        batch_second = isinstance(layer, nn.MultiheadAttention) and not layer.batch_first
        seen[name] = tensor.transpose(0, 1) if batch_second else tensor

    handles = [layer.register_forward_hook(partial(keep, name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def compare(reference: nn.Module, others: Mapping[str, nn.Module], batches: Iterable[Tensor]) -> dict[str, Any]:
    """Compute the CKA of each layer of several models with the same layer of a reference model.

    Args:
        reference: Reference model in eval mode, merged or not.
        others: Models by name, with the same compared layers.
        batches: Images (b, 3, H, W) on the models' device; batches of fewer than four images are skipped.

    Returns:
        CKA by layer, by name of the model.

    Raises:
        UserError: A model has other layers, or no batch had four images.
    """
    mine = vision_layers(reference)
    theirs = {name: vision_layers(model) for name, model in others.items()}
    for name, layers in theirs.items():
        if layers.keys() != mine.keys():
            raise UserError(f"{name} has {len(layers)} layers to compare, the reference has {len(mine)}.")
    sums = {name: {layer: MinibatchCKA() for layer in mine} for name in others}
    count = 0
    for images in batches:
        if len(images) < FEWEST:
            continue
        count += 1
        with outputs(mine) as seen:
            embed(reference, images)
            kernels = {layer: gram(tensor) for layer, tensor in seen.items()}
        for name, model in others.items():
            with outputs(theirs[name]) as seen:
                embed(model, images)
                for layer, tensor in seen.items():
                    sums[name][layer].update(kernels[layer], gram(tensor))
    if not count:
        raise UserError(f"CKA needs a batch of at least {FEWEST} images. Use more images.")
    return {name: {layer: one.value for layer, one in layers.items()} for name, layers in sums.items()}


def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Return the embeddings of images by a CLIP's image tower, or by the model itself."""
    encode = getattr(model, "encode_image", model)
    features: Tensor = encode(images)
    return features


def cka_figure(curves: Mapping[str, Mapping[Layer, float]], reference: str, about: str) -> Figure:
    """Plot CKA by depth, one line per model, attention and MLP side by side (Figure 4a of the paper)."""
    figure = new_figure(9.5, 4.2, "")
    panels = figure.subplots(1, len(KINDS), sharey=True)
    for axes, kind in zip(panels, KINDS, strict=True):
        for label, color in colors(list(curves)).items():
            line = {number + 1: value for (number, which), value in curves[label].items() if which == kind}
            axes.plot(list(line), list(line.values()), marker="o", markersize=4, color=color, label=for_figure(label))
        axes.set(xlabel="block", title="self-attention" if kind == "attention" else "MLP")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel(for_figure(f"CKA with {reference}"))
    legend(figure, panels[0], 3)
    footnote(figure, about)
    return figure


Point = tuple[float, float]
State = dict[str, Tensor]

POSITIONS: dict[str, tuple[Point, Point, Point]] = {
    "paper": ((0.0, 0.0), (1.0, 0.0), (0.5, 1.0)),
    "equilateral": ((0.0, 0.0), (1.0, 0.0), (0.5, 3**0.5 / 2)),
}
"""Positions of the three models: the first as in section 6.2, the second as in appendix A ("equidistant")."""


def coefficients(x: float, y: float, corners: Sequence[Point]) -> tuple[float, float, float]:
    """Return the barycentric coordinates (a_1, a_2, a_3) of (x, y); their sum is 1.

    At a corner they are exactly 1, 0 and 0.
    """
    (x1, y1), (x2, y2), (x3, y3) = corners
    area = (x2 - x1) * (y3 - y1) - (x3 - x1) * (y2 - y1)
    second = ((x - x1) * (y3 - y1) - (x3 - x1) * (y - y1)) / area
    third = ((x2 - x1) * (y - y1) - (x - x1) * (y2 - y1)) / area
    return 1 - second - third, second, third


def weights_of(task: ImageTask) -> State:
    """Return the tensors of a task's backbone, with the update merged, and of its head.

    The backbone is unloaded to plain layers. The tensors are not copied.

    Raises:
        UserError: The update depends on the input, so no weights contain it.
    """
    task.adapter.require_matrix("the landscape")
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
        for other in (each for each in shapes[1:] if each != shapes[0]):
            differing = sorted(n for n in shapes[0].keys() | other.keys() if shapes[0].get(n) != other.get(n))
            raise UserError(f"the models differ in {len(differing)} tensors such as {differing[0]}: no plane has both.")
        self.corners = tuple(corners)
        same = [name for name in target if all(torch.equal(states[0][name], state[name]) for state in states[1:])]
        for name in same:
            target[name].copy_(states[0][name])
        # Equal tensors are written once; integer tensors such as token positions never differ.
        self._moving = [(target[name], [state[name] for state in states]) for name in target if name not in set(same)]

    @classmethod
    def through(cls, tasks: Sequence[ImageTask], corners: Sequence[Point]) -> "Plane":
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
def loss(task: ImageTask, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return a task's mean loss on images (b, 3, H, W) with labels (b,), as in an evaluation; infinity for NaN."""
    task.prepare_evaluation()  # discards text features of other weights
    total, count = 0.0, 0
    for images, labels in batches:
        outputs = task.class_logits(images).float()
        total += float(task.output_loss(outputs, labels, reduction="sum").double())
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


def refuse_several(data: ImageData, option: str) -> None:
    """Refuse images with several labels each, which have no accuracy of one class."""
    if data.several:
        raise UserError(f"{data.row.title}: its images have several labels. Set one with a class each: {option} NAME")


def check_classes(data: ImageData, classnames: list[str]) -> None:
    """Raise a `UserError` if the data has captions or several labels of an image, or other classes than the model."""
    if data.row.captions:
        raise UserError(f"{data.row.name} has captions, not classes. Set a dataset with classes: --dataset NAME")
    refuse_several(data, "--dataset")
    if data.classnames != classnames:
        raise UserError(
            f"{data.row.name} has {len(data.classnames)} classes ({data.classnames[:3]} ...), but the model has "
            f"{len(classnames)} others ({classnames[:3]} ...). Set its dataset: --dataset NAME"
        )


Cell = tuple[int, int]


def low_path(heights: Sequence[Sequence[float]], start: Cell, end: Cell) -> list[Cell]:
    """Return the shortest path among those with the lowest maximum height.

    Args:
        heights: (rows, columns); infinity is allowed.
        start: Row and column of the first cell.
        end: Row and column of the last cell.

    Returns:
        Adjacent cells (also diagonally), with start and end.
    """
    cells = {(row, column): height for row, line in enumerate(heights) for column, height in enumerate(line)}
    level = max(cells[cell] for cell in _cheapest(cells, start, end, lambda top, here, there: max(top, cells[there])))
    low = {cell: height for cell, height in cells.items() if height <= level}
    return _cheapest(low, start, end, lambda length, here, there: length + math.dist(here, there))


def _cheapest(
    cells: Mapping[Cell, float], start: Cell, end: Cell, onwards: Callable[[float, Cell, Cell], float]
) -> list[Cell]:
    """Return the path of the least cost, by Dijkstra's algorithm, over cells with their heights.

    ``onwards`` returns the cost of a path from its cost so far, its last cell and the next one.
    """
    before: dict[Cell, Cell] = {}
    reached = [(0.0, start, start)]
    while end not in before:
        cost, here, last = heappop(reached)
        if here in before:
            continue
        before[here] = last
        for there in product(range(here[0] - 1, here[0] + 2), range(here[1] - 1, here[1] + 2)):
            if there in cells and there not in before:
                heappush(reached, (onwards(cost, here, there), there, here))
    path = [end]
    while path[-1] != start:
        path.append(before[path[-1]])
    return path[::-1]


@dataclass(frozen=True)
class Landscape:
    """Losses on a grid in the plane of three models: ``heights`` has one row per y; ``about`` describes the data."""

    labels: tuple[str, str, str]
    corners: tuple[Point, Point, Point]
    losses: tuple[float, float, float]
    grid: Grid
    heights: list[list[float]]
    about: str

    @property
    def top(self) -> float:
        """Loss at which the plots are cut off: 20 % above the highest loss of the three models (appendix A)."""
        return 1.2 * max(self.losses)

    def paths(self) -> dict[tuple[int, int], list[Cell]]:
        """Return the path of the lowest barrier on the grid for each pair of models."""
        return {
            (i, j): low_path(self.heights, self.grid.nearest(self.corners[i]), self.grid.nearest(self.corners[j]))
            for i, j in ((0, 1), (1, 2), (0, 2))
        }

    def barriers(self) -> dict[str, float]:
        """Return the loss barrier of each pair of models: the maximum on the path minus the higher loss, at least 0.

        Grid points need not coincide with the models. At the ends, the models' own losses are used.
        """
        heights_by_pair = {}
        for (i, j), path in self.paths().items():
            ends = max(self.losses[i], self.losses[j])
            corners = self.corners[i], self.corners[j]
            values = self.grid.values
            between = [(y, x) for y, x in path if (values[x], values[y]) not in corners]
            top = max((self.heights[row][column] for row, column in between), default=ends)
            heights_by_pair[f"{self.labels[i]} - {self.labels[j]}"] = max(0.0, top - ends)
        return heights_by_pair

    @property
    def on_grid(self) -> bool:
        """True if all models are grid points; otherwise barriers are rough near them."""
        return all(value in self.grid.values for corner in self.corners for value in corner)


def contour_figure(landscape: Landscape) -> Figure:
    """Plot the contours of the loss, the three models and the lowest paths between them."""
    figure = new_figure(8, 6.6, f"Loss on the plane through three models\n{landscape.about}")
    axes = figure.subplots()
    heights = np.minimum(np.array(landscape.heights, dtype=np.float64), landscape.top)
    lowest = min(float(heights.min()), *landscape.losses)  # a coarse grid may miss the minima
    levels = np.linspace(lowest, max(landscape.top, lowest + 1e-12), 22)
    values = landscape.grid.values
    filled = axes.contourf(values, values, heights, levels, cmap="viridis")
    axes.contour(values, values, heights, levels[:-1], colors="white", linewidths=0.4, alpha=0.6)
    figure.colorbar(filled, ax=axes, label=f"loss, cut off at {landscape.top:.3g}", format="%.3g")
    for (i, j), path in landscape.paths().items():
        inner = [(values[column], values[row]) for row, column in path[1:-1]]
        points = zip(landscape.corners[i], *inner, landscape.corners[j], strict=True)  # from model to model
        axes.plot(*map(list, points), color="white", linestyle="--", linewidth=1.6)
    axes.plot([], [], color="white", linestyle="--", label="path of the lowest barrier")
    styles = colors(list(landscape.labels))
    for label, corner, loss, marker in zip(landscape.labels, landscape.corners, landscape.losses, "osD", strict=True):
        axes.plot(
            *corner, marker, color=styles[label], markersize=10, markeredgecolor="white", linestyle="none",
            label=for_figure(f"{label}: {loss:.4g}"),
        )  # fmt: skip
    axes.set(aspect="equal", xlabel="x", ylabel="y")
    axes.legend(loc="upper left", fontsize=8, facecolor="#444444", labelcolor="white")
    highest = max(landscape.barriers().values())
    climb = f"at most {highest:.3g} above the higher end" if highest > 0 else "never above the higher end"
    footnote(figure, f"on the grid the paths climb {climb}")
    return figure
