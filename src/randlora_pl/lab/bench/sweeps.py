"""Cost of adapted layers against width, tokens, bases, depth and sparsity: one changes, the rest stay."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from randlora_pl.lab.bench.methods import METHODS, adapted, label, ternary
from randlora_pl.lab.bench.steps import Case, Measured, Precision, available


@dataclass(frozen=True)
class Point:
    """A stack of square linear layers and its input.

    Attributes:
        width: In and out features of each layer.
        tokens: Rows of the input; 3,200 correspond to 64 images of a ViT-B/32.
        rank: Rank of RandLoRA's bases, of which there are width / rank.
        depth: Layers; RandLoRA's share their bases.
        sparsity: s of ternary bases.
    """

    width: int = 768
    tokens: int = 3200
    rank: int = 6
    depth: int = 1
    sparsity: int | Literal["sqrt"] = 6

    @property
    def bases(self) -> int:
        """Return the number n of bases."""
        return -(-self.width // self.rank)


DEFAULTS: dict[str, list[Any]] = {
    "width": [256, 512, 1024, 2048, 4096],
    "tokens": [200, 800, 3200, 12800],
    "rank": [4, 6, 12, 24, 48, 96],
    "depth": [1, 2, 4, 8],
    "sparsity": [6, 12, 28, 100],
}
"""Values of each sweep."""
BASES = {
    "uniform": ["full", "randlora"],
    "hadamard": ["full", "randlora-hadamard"],
    "ternary": ["full", "randlora-ternary", "randlora-ternary-dense"],
}
"""Methods to compare by basis: products by additions alone beside dense products for ternary bases."""


@dataclass(frozen=True)
class Reading:
    """Measurements of all methods at one point."""

    sweep: str
    point: Point
    methods: list[Measured]

    @property
    def value(self) -> float:
        """Return the value of what changes."""
        return _number(self.point, self.sweep)

    @property
    def text(self) -> str:
        """Return the value of what changes as in tables."""
        value = getattr(self.point, self.sweep)
        return value if isinstance(value, str) else f"{value:,}"

    def as_rows(self) -> Iterator[dict[str, Any]]:
        """Yield one flat row a method, for CSV and JSON."""
        full = next((one for one in self.methods if one.name == "full"), None)
        for one in self.methods:
            spread, ratio = one.spread(), one.ratio(full)
            row: dict[str, Any] = {"sweep": self.sweep, **asdict(self.point), "bases": self.point.bases}
            row |= {"method": one.name, "label": one.label, "trained": one.trained}
            row |= {f"seconds_{key}": value for key, value in (asdict(spread) if spread else {}).items()}
            row |= {"times_full": ratio.median if ratio else None, "saved_bytes": one.saved, "peak_bytes": one.peak}
            yield row | {"flops": one.flops, "of_peak": one.of_peak(), "problem": one.problem}


def readings(sweeps: dict[str, list[Any]]) -> list[tuple[str, Point]]:
    """Return the points of all sweeps, each in ascending order around the same middle."""
    points = [(name, replace(Point(), **{name: value})) for name in sweeps for value in dict.fromkeys(sweeps[name])]
    return sorted(points, key=lambda each: (list(sweeps).index(each[0]), _number(each[1], each[0])))


def _number(point: Point, sweep: str) -> float:
    value = getattr(point, sweep)
    return math.sqrt(point.width) if value == "sqrt" else value


def methods_at(sweep: str, names: Sequence[str]) -> list[str]:
    """Return the methods that a sweep is about: only RandLoRA has bases whose number or sparsity changes."""
    part = {"rank": "randlora", "sparsity": "ternary"}.get(sweep, "")
    return [name for name in names if name == "full" or part in name]


def cases(
    point: Point, names: Sequence[str], device: torch.device, precision: Precision = "32"
) -> tuple[list[Case], list[Measured]]:
    """Return the methods that can be measured at a point, forward and backward passes; and why the others cannot.

    The input asks for a gradient, as inside of a network.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        base = nn.Sequential(*(nn.Linear(point.width, point.width) for _ in range(point.depth)))
    x = torch.randn(point.tokens, point.width, generator=generator).to(device).requires_grad_()
    upper = torch.randn(point.tokens, point.width, generator=generator).to(device)

    def loss(model: nn.Module) -> Tensor:
        product: Tensor = model(x) * upper
        return product.sum()

    def rank(name: str) -> int:
        return point.rank if "randlora" in name else METHODS[name].rank

    def case(name: str) -> Case:
        sparse = ternary(point.sparsity, name.endswith("dense")) if "ternary" in name else None
        model = adapted(base, name, rank(name), adapt=sparse)
        return Case(
            name, label(name, rank(name)), model, loss, [x, upper],
            device=device, precision=precision, optimize=False, foreign=METHODS[name].foreign,
        )  # fmt: skip

    return available(names, case, lambda name: label(name, rank(name)))


def estimated_seconds(points: Sequence[tuple[str, Point]], methods: int, rounds: int, rate: float) -> float:
    """Return roughly how long the sweeps take on a machine that does ``rate`` operations a second at best.

    Building a weight costs as much as 1.5 times ``width`` further tokens do.
    """
    flops = sum(6 * (point.tokens + 1.5 * point.width) * point.width**2 * point.depth for _, point in points)
    return methods * (rounds + 1) * (flops / (0.5 * rate) + 0.5 * len(points))
