"""Bilevel search over selection variables, the procedure of `AutoLoRA`.

The weights w minimize the loss L_T on training samples; the selection variables v minimize the loss L_V of these
weights on held-out samples. With xi the learning rate of w, a step of v follows

    g = dL_V/dv(w', v) - [dL_T/dv(w + e d, v) - dL_T/dv(w - e d, v)] / (2 e)
    with w' = w - xi dL_T/dw(w, v) and d = xi dL_V/dw(w', v)

the gradient through one step of w by a central difference (DARTS, arXiv:1806.09055, equations 7 and 8). The first order
leaves out the bracket and takes w' = w. Released code of AutoLoRA lacks the factor xi of the bracket.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters.procedure import Procedure, all_finite
from randlora_pl.utils.errors import UserError

RATE, BETAS = 3e-4, (0.5, 0.999)
"""Settings of the Adam of v, as in the released code."""
RADIUS = 0.01
"""Distance of the two points of the central difference from w."""
FLOAT_ERROR = 1e-6
"""Relative error of a share that counts as equal to 1/K."""


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
        found = torch.autograd.grad(loss(step) * scale, tensors, allow_unused=True, materialize_grads=True)
        return [self.average(gradient / scale) for gradient in found]


def outer_gradient(problem: Problem, step: int, outer: Sequence[Tensor], unrolled: bool) -> list[Tensor]:
    """Return g for each selection vector (see above); all trained tensors are as before, bit for bit.

    Args:
        problem: The losses.
        step: Step whose batches are taken.
        outer: Selection vectors v, without a gradient.
        unrolled: Differentiate through a step of the weights.
    """
    with _differentiable(outer):
        if not unrolled:
            return problem.gradients(problem.search_loss, step, outer)
        if not (trained := problem.rates()):
            raise UserError("AutoLoRA: order unrolled needs learning rates: Problem(..., rates=...).")
        weights, rates = zip(*trained, strict=True)
        before = [weight.detach().clone() for weight in weights]
        try:
            steps = problem.gradients(problem.train_loss, step, weights)
            _set(weights, before, [-rate * each for rate, each in zip(rates, steps, strict=True)])
            found = problem.gradients(problem.search_loss, step, [*outer, *weights])
            directions = [rate * each for rate, each in zip(rates, found[len(outer) :], strict=True)]
            norm = torch.stack([each.float().norm() for each in directions]).norm()
            size = RADIUS / norm.clamp_min(torch.finfo(norm.dtype).tiny)
            sides = []
            for side in (size, -size):
                _set(weights, before, [side * each for each in directions])
                sides.append(problem.gradients(problem.train_loss, step, outer))
        finally:
            _set(weights, before)
        return [g - (plus - minus) / (2 * size) for g, plus, minus in zip(found, *sides, strict=False)]


@contextmanager
def _differentiable(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Make buffers leaves with a gradient for a while."""
    for tensor in tensors:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in tensors:
            tensor.requires_grad_(False)


@torch.no_grad()
def _set(weights: Sequence[Tensor], values: Sequence[Tensor], changes: Sequence[Tensor] | None = None) -> None:
    """Set weights to values plus changes."""
    for number, (weight, value) in enumerate(zip(weights, values, strict=True)):
        weight.copy_(value if changes is None else value + changes[number])


def components(v: Tensor) -> int:
    """Return how many components have a share of at least 1/K, or 1 if there is none: all of equal ones."""
    shares = v.detach().cpu().double().softmax(0)
    return max(1, int((shares >= (1 - FLOAT_ERROR) / len(shares)).sum()))


class SelectionSearch(Procedure):
    """Search over the selection variables of all updates of a model.

    Tasks set the problem. In a training loop of your own, set it before the first step:

        procedure.problem = Problem(lambda step: loss(model, own_batch(step)), lambda step: loss(model, held_out(step)))

    Args:
        unrolled: Differentiate through a step of the weights.
        every: Optimizer steps from one step of v to the next.
        updates: Updates with a buffer ``v``, a ``shape``, and ``found`` with the options for what was found.
        method: Method to train next.
        options: Its options other than those that ``found`` returns.

    Attributes:
        problem: The losses, or None before they are set.
    """

    def __init__(
        self, unrolled: bool, every: int, updates: Sequence[Any], method: str, options: dict[str, Any]
    ) -> None:
        self.unrolled, self.every, self.updates = unrolled, every, updates
        self.method, self.options = method, options
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
        """Make the Adam of v."""
        self._adam = torch.optim.Adam(self.vectors, lr=RATE, betas=BETAS)

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
        if (step + 1) % self.every:
            return
        vectors = self.vectors
        gradients = outer_gradient(self.problem, step, vectors, self.unrolled)
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
        found: dict[str, dict[str, float]] = {}
        for update in self.updates:
            for option, value in update.found().items():
                found.setdefault(option, {})[f"^{re.escape(update.shape.layer)}"] = value
        counts = list(self.counts().values())
        adapter = {"class_path": self.method, "init_args": self.options | found}
        return {"search/mean": sum(counts) / len(counts), "search/adapter": adapter}
