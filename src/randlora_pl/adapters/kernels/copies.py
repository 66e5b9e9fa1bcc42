"""Copies of shared random tensors in other dtypes and layouts, made once for all layers, batches and steps."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


class Copies:
    """Tensors computed from one source, by key, on its device.

    They are made again if the source moves or changes. Pickling and `copy.deepcopy` leave them out. Nothing is stored
    while a tracer records: a compiled program reads what an earlier call has stored as one of its inputs.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Tensor] = {}
        self._source: tuple[Any, ...] = (None,)

    def get(self, key: Hashable, source: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """Return the tensor of a key, computed by ``make`` at its first use."""
        if torch.compiler.is_compiling():
            made = self._made.get(key)
            return make() if made is None or made.device != source.device else made
        now = (source.device, -1 if source.is_inference() else source._version)
        if self._source[0] is not source or self._source[1:] != now:
            self._made, self._source = {}, (source, *now)
        made = self._made.get(key)
        if made is None:
            with torch.inference_mode(False), torch.no_grad():
                made = make()
            if storable(made, source):
                self._made[key] = made
        return made

    def clear(self) -> None:
        """Drop all tensors."""
        self._made, self._source = {}, (None,)

    def __len__(self) -> int:
        return len(self._made)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Copies, ())


def storable(made: Tensor, source: Tensor) -> bool:
    """Return True if a tensor is of the source's kind: not made by a tracer from a source that exists without it."""
    traced = torch._C._get_tracing_state() is not None or torch._C._functorch.maybe_current_level() is not None
    mode = getattr(made, "fake_mode", None)
    return not traced and mode is getattr(source, "fake_mode", None) and (mode is not None or type(made) is Tensor)
