"""AutoLoRA: a search for the rank of each weight (Zhang et al., NAACL 2024, arXiv:2403.09113).

    delta W = alpha/K * B diag(a) A,  a = softmax(v)

v (K) is a kept buffer, which `SelectionSearch` trains on samples that A and B do not see. The result is the
number of components with a share a_k of at least 1/K, for a new LoRA. The same search chooses among RandLoRA's bases
(section C.5.1 of the RandLoRA paper): delta W = alpha/r * sum_j a_j B_j diag(lambda_j) A diag(gamma_j).

The search is bilevel: the weights w minimize the loss L_T on training samples; the selection variables v minimize the
loss L_V of these weights on held-out samples. With xi the learning rate of w, a step of v follows

    g = dL_V/dv(w', v) - [dL_T/dv(w + e d, v) - dL_T/dv(w - e d, v)] / (2 e)
    with w' = w - xi dL_T/dw(w, v) and d = xi dL_V/dw(w', v)

the gradient through one step of w by a central difference (DARTS, arXiv:1806.09055, equations 7 and 8). The first order
leaves out the bracket and takes w' = w. Released code of AutoLoRA lacks the factor xi of the bracket.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import Adapter, DeltaWeight, Part, Procedure, Rank, all_finite
from randlora_pl.adapters.methods.lora import LoRA, LoRADelta
from randlora_pl.adapters.methods.randlora import RandLoRA, RandLoRADelta
from randlora_pl.adapters.random_bases import Bases, WeightShape
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Count


@dataclass
class Problem:
    """Two losses of a training run, without side effects on it.

    Attributes:
        train_loss: Function of the step that returns the loss on training samples, a scalar.
        search_loss: The same on held-out samples.
        rates: Function that returns each trained tensor with its learning rate; only for ``order: unrolled``.
        average: Function that averages a gradient over all devices.
        scale: Function that returns a factor of the losses in backward passes, against underflow in float16.
    """

    train_loss: Callable[[int], Tensor]
    search_loss: Callable[[int], Tensor]
    rates: Callable[[], Sequence[tuple[Tensor, float]]] = tuple
    average: Callable[[Tensor], Tensor] = lambda gradient: gradient
    scale: Callable[[], float] = lambda: 1.0

    def gradients(self, loss: Callable[[int], Tensor], step: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of a loss; ``.grad`` of all tensors stays as it is."""
        scale = self.scale()
        gradients = torch.autograd.grad(loss(step) * scale, tensors, allow_unused=True, materialize_grads=True)
        return [self.average(gradient / scale) for gradient in gradients]


def _outer_gradient(problem: Problem, step: int, outer: Sequence[Tensor], unrolled: bool) -> list[Tensor]:
    """Return g for each selection vector (see above); all trained tensors are as before, bit for bit."""
    trained = problem.rates() if unrolled else ()
    if unrolled and not trained:
        raise UserError("AutoLoRA: order unrolled needs learning rates: Problem(..., rates=...).")
    weights, rates = [weight for weight, _ in trained], [rate for _, rate in trained]
    before = [weight.detach().clone() for weight in weights]
    for vector in outer:
        vector.requires_grad_(True)
    try:
        if not unrolled:
            return problem.gradients(problem.search_loss, step, outer)
        steps = problem.gradients(problem.train_loss, step, weights)
        _set(weights, before, [-rate * each for rate, each in zip(rates, steps, strict=True)])
        gradients = problem.gradients(problem.search_loss, step, [*outer, *weights])
        directions = [rate * each for rate, each in zip(rates, gradients[len(outer) :], strict=True)]
        norm = torch.stack([each.float().norm() for each in directions]).norm()
        size = 0.01 / norm.clamp_min(torch.finfo(norm.dtype).tiny)  # distance of the two points from w
        sides = []
        for side in (size, -size):
            _set(weights, before, [side * each for each in directions])
            sides.append(problem.gradients(problem.train_loss, step, outer))
        return [g - (plus - minus) / (2 * size) for g, plus, minus in zip(gradients, *sides, strict=False)]
    finally:
        _set(weights, before)
        for vector in outer:
            vector.requires_grad_(False)


@torch.no_grad()
def _set(weights: Sequence[Tensor], values: Sequence[Tensor], changes: Sequence[Tensor] | None = None) -> None:
    for number, (weight, value) in enumerate(zip(weights, values, strict=True)):
        weight.copy_(value if changes is None else value + changes[number])


def components(v: Tensor) -> int:
    """Return how many components have a share of at least 1/K, or 1 if there is none: all of equal ones."""
    shares = v.detach().cpu().double().softmax(0)
    return max(1, int((shares >= (1 - 1e-6) / len(shares)).sum()))  # but for rounding


RATE = 3e-4  # of the Adam of v, as in the released code


class SelectionSearch(Procedure):
    """Search over the selection variables of all updates of a model.

    Tasks set the problem. In a training loop of your own, set it before the first step:

        procedure.problem = Problem(lambda step: loss(model, own_batch(step)), lambda step: loss(model, held_out(step)))

    Args:
        adapter: Method of the search, with its order, the steps ``every`` from one step of v to the next, and the
            method to train next.
        updates: Updates with a buffer ``v``, a ``shape``, and ``selected_options`` for the method to train next.

    Attributes:
        problem: The losses, or None before they are set.
    """

    def __init__(self, adapter: "AutoLoRA", updates: Sequence["SelectedRanks | SelectedBases"]) -> None:
        self.adapter, self.updates, self.unrolled = adapter, updates, adapter.order == "unrolled"
        self.problem: Problem | None = None
        self._adam: torch.optim.Adam | None = None

    @property
    def vectors(self) -> list[Tensor]:
        """Selection variables of all updates."""
        return [update.v for update in self.updates]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the problem, whose functions belong to a running training."""
        return {**vars(self), "problem": None}

    def start(self, model: nn.Module) -> None:
        """Make the Adam of v, with the settings of the released code."""
        self._adam = torch.optim.Adam(self.vectors, lr=RATE, betas=(0.5, 0.999))

    def after_step(self, step: int, total: int) -> None:
        """Take a step of v, after every ``every``-th optimizer step, unless its gradient is not finite.

        Raises:
            UserError: The losses are not set.
        """
        super().after_step(step, total)
        if self.problem is None or self._adam is None:
            raise UserError(
                "AutoLoRA: the search needs held-out samples. Use a task and its data module, or set "
                "report.procedure.problem = Problem(...) and call report.procedure.start(model) before the first step."
            )
        if (step + 1) % self.adapter.every:
            return
        vectors = self.vectors
        gradients = _outer_gradient(self.problem, step, vectors, self.unrolled)
        if not all_finite(gradients):  # 16-mixed: the scale of the losses was too large
            return
        for vector, gradient in zip(vectors, gradients, strict=True):
            vector.grad = gradient
        self._adam.step()
        for vector in vectors:
            vector.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the moments of Adam; v itself is a kept buffer."""
        return {} if self._adam is None else {"adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the moments of Adam."""
        if self._adam is not None and "adam" in state:
            self._adam.load_state_dict(state["adam"])

    def counts(self) -> dict[str, int]:
        """Return the number of components found, by layer."""
        return {update.shape.layer: components(update.v) for update in self.updates}

    def finish(self) -> dict[str, Any]:
        """Return the mean number of components found, and the method to train next as in a config, with patterns."""
        options_by_layer: dict[str, dict[str, float]] = {}
        for update in self.updates:
            for option, value in update.selected_options().items():
                options_by_layer.setdefault(option, {})[f"^{re.escape(update.shape.layer)}"] = value
        selected = self.adapter.selected
        names = ("dropout", "qkv") if self.adapter.select == "ranks" else ("rank", "alpha", "dropout", "qkv")
        usual, options = type(selected)().options(), selected.options()
        arguments = {name: options[name] for name in names if options[name] != usual[name]} | options_by_layer
        counts = list(self.counts().values())
        adapter = {"class_path": selected.method(), "init_args": arguments}
        return {"search/mean": sum(counts) / len(counts), "search/adapter": adapter}


RANK, ALPHA = 8, 16.0  # defaults of the released code


class AutoLoRA(Adapter):
    """AutoLoRA: searches the rank of each weight, for a LoRA that is then trained with the ranks found.

    Examples:
        >>> report = inject(model, AutoLoRA(rank=4))
        >>> report.trainable
        18432
        >>> set(report.procedure.counts().values())  # all of 4 equal components, before a search
        {4}
    """

    rank: Rank = RANK
    """Number K of components of each weight, the largest rank. A number, or numbers by pattern of layer names. With
    ``select: bases`` the rank r of RandLoRA's bases."""
    alpha: float | dict[str, float] = ALPHA
    """The update is scaled by alpha / rank. A number, or numbers by pattern, as ``rank``."""
    select: Literal["ranks", "bases"] = "ranks"
    """``ranks`` searches the rank of a LoRA, ``bases`` the number of bases of a RandLoRA."""
    order: Literal["first", "unrolled"] = "first"
    """``first`` takes the gradient of v at the present weights, one more pass per step; ``unrolled`` also through the
    next step of the weights, four more passes."""
    every: Count = 1
    """Optimizer steps from one step of v to the next."""

    learning_rates = (3e-4, 3e-4, 3e-4)  # its code, for RoBERTa
    searches = True  # data modules hold out training samples for it

    @property
    def selected(self) -> LoRA | RandLoRA:
        """Method whose components are selected."""
        rank = {**self.rank, ".*": RANK} if isinstance(self.rank, dict) else self.rank
        alpha = {**self.alpha, ".*": ALPHA} if isinstance(self.alpha, dict) else self.alpha
        options: dict[str, Any] = {"dropout": self.dropout, "qkv": self.qkv, "seed": self.seed}
        if self.select == "ranks":
            return LoRA(rank=rank, alpha=alpha, **options)
        return RandLoRA(rank=rank, alpha=alpha, memory="low", **options)  # a step has several S, so none is kept

    def count(self, shape: WeightShape) -> int:
        """Return the parameters of the selected method; v (K) is a buffer."""
        return self.selected.count(shape)

    def bases(self, shapes: list[WeightShape], device: torch.device) -> Bases | None:
        """Return the bases of RandLoRA, or None."""
        return self.selected.bases(shapes, device)

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> DeltaWeight:
        """Create the update of one weight, with v = 0."""
        selected = self.selected
        if isinstance(selected, LoRA):
            return SelectedRanks(selected, shape, weight)
        assert bases is not None
        return SelectedBases(selected, shape, weight, bases)

    def in_peft(self, parts: list[Part]) -> tuple[Adapter, list[Part]]:
        """Return the LoRA, or with ``select: bases`` the RandLoRA, with the same update."""
        selected = []
        for part in parts:
            tensors = dict(part.tensors)
            shares = tensors.pop("v").double().softmax(0)
            name = "B" if self.select == "ranks" else "lambdas"
            scaled = tensors[name].double() * (shares if self.select == "ranks" else shares[:, None])
            selected.append(replace(part, tensors=tensors | {name: scaled.float()}))
        return self.selected, selected

    def procedure(self, model: nn.Module) -> SelectionSearch:
        """Return the search."""
        return SelectionSearch(
            self, [each for each in model.modules() if isinstance(each, SelectedRanks | SelectedBases)]
        )


class SelectedRanks(LoRADelta):
    """alpha/K * B diag(softmax(v)) A of one weight."""

    kept = ("v",)
    v: Tensor

    def __init__(self, adapter: LoRA, shape: WeightShape, weight: Tensor) -> None:
        super().__init__(adapter, shape, weight)
        self.shape = shape
        self.register_buffer("v", self.A.new_zeros(len(self.A)))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return B with scaled columns, (out, K), and A, (K, in)."""
        return self.B * (self.v.softmax(0) * self.scaling), self.A

    def selected_options(self) -> dict[str, float]:
        """Return LoRA's options for the components found, at alpha/K: K times the search's scaling at equal shares."""
        rank = components(self.v)
        return {"rank": rank, "alpha": rank * self.scaling}


class SelectedBases(RandLoRADelta):
    """alpha/r * sum_j softmax(v)_j B_j diag(lambda_j) A diag(gamma_j) of one weight."""

    kept = ("v",)
    v: Tensor

    def __init__(self, adapter: RandLoRA, shape: WeightShape, weight: Tensor, bases: Bases) -> None:
        super().__init__(adapter, shape, weight, bases)
        self.shape = shape
        self.register_buffer("v", self.lambdas.new_zeros(len(self.lambdas)))

    def trained(self) -> tuple[Tensor, Tensor]:
        """Return lambda (n, r) with scaled rows, and gamma (n, d)."""
        lambdas, gammas = super().trained()
        return lambdas * self.v.softmax(0)[:, None], gammas

    def selected_options(self) -> dict[str, float]:
        """Return RandLoRA's options for the components found."""
        return {"num_bases": components(self.v)}
