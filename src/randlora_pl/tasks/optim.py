"""Learning rates of the protocols: defaults, optimizer groups, and schedules, which are stepped per optimizer step."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from randlora_pl.adapters import Adapter
from randlora_pl.adapters.operations import by_rate
from randlora_pl.utils.errors import UserError

TOWERS, IMAGES, TEXTS = 0, 1, 2
"""Places in `Adapter.learning_rates`: both towers, an image tower, a language model."""


def default_learning_rate(adapter: Adapter, place: int) -> float:
    """Return the default learning rate of a method: the lowest of the methods inside it.

    Raises:
        UserError: A method from outside has none.
    """
    leaves = adapter.leaves()
    if alone := [leaf.method() for leaf in leaves if leaf.learning_rates is None]:
        raise UserError(f"{alone[0]} has no learning rate of its own. Set it: --model.learning_rate 1e-3, for example.")
    return min(leaf.learning_rates[place] for leaf in leaves if leaf.learning_rates is not None)


Factor = Callable[[int], float]
"""Factor of a learning rate after a number of finished optimizer steps."""


def parameter_groups(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    decay_vectors: bool,
    factors: Mapping[nn.Parameter, float] = MappingProxyType({}),
    undecayed: Set[nn.Parameter] = frozenset(),
) -> list[dict[str, Any]]:
    """Return optimizer groups of matrices, of vectors and of what is ``undecayed``.

    They are the same for any options, so that a checkpoint fits. Frozen parameters are left out. With ``decay_vectors``
    biases, norms and scalars decay too, as in the protocol.
    Parameters with other ``factors`` of the learning rate than 1 come last, in groups of their own.
    """
    groups = []
    for factor, some in by_rate((each for each in parameters if each.requires_grad), factors):
        decaying, still = [p for p in some if p not in undecayed], [p for p in some if p in undecayed]
        matrices, vectors = [p for p in decaying if p.dim() > 1], [p for p in decaying if p.dim() <= 1]
        kinds = ((matrices, weight_decay), (vectors, weight_decay if decay_vectors else 0.0), (still, 0.0))
        rate = learning_rate * factor
        groups += [{"params": kind, "lr": rate, "weight_decay": decay} for kind, decay in kinds if kind]
    return groups


def schedule_factor(step: int, total: int, warmup: int, final: float, schedule: str = "cosine") -> float:
    """Return the factor of the learning rate at an optimizer step: linear warm-up, then half a cosine or a line.

    Args:
        step: Finished optimizer steps.
        total: Optimizer steps of the whole run.
        warmup: Steps of the linear warm-up, 0 for none.
        final: Factor at the end.
        schedule: ``cosine`` or ``linear``.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    left = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return final + (1 - final) * left


def epoch_factor(epoch: int, epochs: int, learning_rate: float) -> float:
    """Return the factor of a learning rate in an epoch: 1e-5 in the first, then half a cosine that never reaches 0.

    This is the schedule of CoOp and of the papers that build on it. ``epoch`` counts finished epochs, ``epochs`` all,
    and ``learning_rate`` is the peak.
    """
    return 1e-5 / learning_rate if epoch == 0 else 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def epoch_factors(finished: Callable[[int], int], epochs: int, rates: Iterable[float]) -> list[Factor]:
    """Return the factors of learning rates per epoch; ``finished`` gives the finished epochs after some steps."""

    def of_rate(rate: float) -> Factor:  # a function has no state, which the scheduler would store
        return lambda step: epoch_factor(finished(step), epochs, rate)

    return [of_rate(rate) for rate in rates]


def check_epochs(epochs: int | None) -> None:
    """Refuse the schedule per epoch for a run that is planned in steps or has one epoch."""
    if not epochs:
        raise UserError("the schedule of epochs needs --data.epochs, not --data.steps; or use --model.schedule cosine.")
    if epochs == 1:
        raise UserError(
            "the schedule of epochs has a rate of 1e-5 in the first epoch, and --data.epochs is 1: set "
            "--data.epochs 2 or more, or use --model.schedule cosine."
        )


def set_learning_rates(optimizer: Optimizer, scheduler: LambdaLR, groups: Sequence[dict[str, Any]]) -> None:
    """Set this run's learning rates and decays in an optimizer, new or restored, and a scheduler at the same step.

    The groups must be in the optimizer's order.
    """
    scheduler.base_lrs = [group["lr"] for group in groups]
    for group, own, factor in zip(optimizer.param_groups, groups, scheduler.lr_lambdas, strict=True):
        group["weight_decay"], group["initial_lr"] = own["weight_decay"], own["lr"]
        group["lr"] = own["lr"] * factor(scheduler.last_epoch)
        if "eps" in own:
            group["eps"] = own["eps"]
