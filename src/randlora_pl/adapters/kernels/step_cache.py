"""S and W0 + B S of a layer, kept while its tensors stay the same: over micro-batches, recomputation and generation.

A layer that is used once in each optimizer step keeps nothing. The second use of the same tensors starts keeping, and
the following steps keep from their first use. Tensors are the same if they are the same objects with the same version
counters, and no optimizer has taken a step (PyTorch's fused optimizers do not count their changes). So results have the
same bits with and without the cache.

An optimizer step drops everything, and so do a change between training and evaluation, merging, and moving the module.
A change of trained values through ``.data`` is not seen before the next of these.
"""

from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from randlora_pl.adapters.random_bases import storable


class Held:
    """Tensors that a layer keeps during one step.

    Attributes:
        before: Uses in the step before.
        recomputes: True if the forward ran again in the backward pass of the step before (gradient checkpointing).
        training: True in training.
        uses: Uses in this step.
        recomputed: As ``recomputes``, in this step.
    """

    def __init__(self, before: int = 1, recomputes: bool = False, training: bool = False) -> None:
        self.before, self.recomputes, self.training = before, recomputes, training
        self.uses, self.recomputed = 0, False
        self.stamp: tuple[Any, ...] = ()
        self.sources: tuple[Tensor, ...] = ()
        self._made: dict[Hashable, tuple[Any, Tensor, Tensor | None]] = {}

    @property
    def active(self) -> bool:
        """True if tensors are kept: after the first use, or from the first use if the last step had several."""
        return self.uses > 1 or (self.training and self.uses == 1 and self.before > 1)

    def get(self, key: Hashable, make: Callable[[], Tensor], weight: Tensor | None = None) -> Tensor:
        """Return the tensor of a key, from ``make`` unless it is kept; with a weight, only while that is the same."""
        if not self.active or (weight is not None and weight.is_inference()):
            return make()
        stamp: tuple[Any, ...] | None = None
        if weight is not None:  # differs if the weight's values may differ, while its storage exists
            real = type(weight) in (Tensor, nn.Parameter)
            place = weight.data_ptr() if real else id(weight if weight._base is None else weight._base)
            stamp = (place, weight._version, weight.shape, weight.stride(), weight.dtype)
        found = self._made.get(key)
        if found is not None and found[0] == stamp:
            return found[1]
        with torch.inference_mode(False), torch.no_grad():
            made = make()
        if storable(made, self.sources[0]):
            # The weight's storage is kept with it: no other tensor can take its address.
            self._made[key] = (stamp, made, None if weight is None else weight.detach())
            _LIVE.add(self)
        return made

    def drop(self) -> None:
        """Drop all tensors."""
        self._made.clear()


class StepCache:
    """Tensors that a layer keeps from one step to the next; copies of a module begin with nothing."""

    def __init__(self) -> None:
        self.held = Held()

    def begin(self, lambdas: Tensor, gammas: Tensor, shared: tuple[Tensor, ...], training: bool) -> Held:
        """Return what the layer keeps, at a use of its tensors; something that keeps nothing while a tracer records."""
        if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
            return Held()
        if not (isinstance(lambdas, nn.Parameter) and isinstance(gammas, nn.Parameter)) or lambdas.is_inference():
            return Held()
        sources = (lambdas, gammas, *shared)
        versions = tuple(-1 if each.is_inference() else each._version for each in sources)
        stamp = (_steps, training, lambdas.device, lambdas.dtype, versions)
        last = self.held
        if stamp != last.stamp or any(one is not two for one, two in zip(sources, last.sources, strict=True)):
            last.drop()
            if training and last.training:
                self.held = Held(last.uses, last.recomputed, True)
            else:
                self.held = Held(last.before, last.recomputes, training)
            self.held.stamp, self.held.sources = stamp, sources
        self.held.uses += 1
        if training and torch._C._current_graph_task_id() != -1:  # in a backward pass
            self.held.recomputed = True
        return self.held

    def clear(self) -> None:
        """Drop all tensors, also the update's."""
        self.held.drop()
        self.held = Held(self.held.before, self.held.recomputes)

    def __reduce__(self) -> tuple[Any, ...]:
        return (StepCache, ())


_LIVE: WeakSet[Held] = WeakSet()
_steps = 0


def end_step(*_: Any) -> None:
    """Begin the next step: drop what is kept. Every step of an optimizer of PyTorch calls this."""
    global _steps
    _steps += 1
    for held in list(_LIVE):
        held.drop()
    _LIVE.clear()


register_optimizer_step_post_hook(end_step)
