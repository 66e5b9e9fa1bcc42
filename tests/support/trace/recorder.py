"""Record of a training step, call by call, on tensors without data."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.trace.costs import Cost, cost_of, is_free, products_dtype, tensors_in
from tests.support.trace.fake_gpu import DEVICE

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Call:
    """A call that starts at least one kernel.

    Attributes:
        name: Operator, such as ``aten::mm``.
        cost: Its bytes and operations.
        dtype: Of its products.
        cast: Whether it only changes a dtype.
    """

    name: str
    cost: Cost
    dtype: torch.dtype
    cast: bool = False


@dataclass
class Traced:
    """A step as a list of calls.

    Attributes:
        calls: In order.
        peak: Most bytes that were in use at once, with weights, gradients and the optimizer's state.
        waits: Values that the host read from the device.
    """

    calls: list[Call] = field(default_factory=list)
    peak: int = 0
    waits: int = 0

    @property
    def kernels(self) -> int:
        """Number of kernels."""
        return sum(call.cost.launches for call in self.calls)

    @property
    def flops(self) -> int:
        """Operations of matrix products, convolutions and attention."""
        return sum(call.cost.flops for call in self.calls)

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return sum(call.cost.read + call.cost.written for call in self.calls)

    @property
    def cast_bytes(self) -> int:
        """Bytes that casts read and write."""
        return sum(call.cost.read + call.cost.written for call in self.calls if call.cast)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every call inside a ``with`` block; tensors are on `fake_gpu.DEVICE` for Python, on the CPU for C++.

    Views, allocations and reads of shapes start no kernel. To be entered within a `FakeTensorMode`.

    Attributes:
        traced: What was recorded, while `recording`.
        recording: Whether calls are recorded; memory always is.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traced, self.recording = Traced(), False
        self._live = 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count the memory of tensors that exist already."""
        for tensor in tensors:
            self._hold(tensor)

    def start(self) -> None:
        """Forget what was recorded, and record from here on."""
        self.traced, self.recording = Traced(peak=self._live), True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a call and record it."""
        if func is torch.ops.prim.device.default:
            return _CPU
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:  # C++ takes everything for the CPU's
            kwargs["device"] = DEVICE
        if func is torch.ops.aten._local_scalar_dense.default:
            self.traced.waits += self.recording
            return True if args[0].dtype == torch.bool else 1
        result = func(*args, **kwargs)
        self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        inputs, outputs = tensors_in([*args, *kwargs.values()]), tensors_in(result)
        there = {tensor.untyped_storage()._cdata for tensor in inputs}
        new = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in there]
        self.hold(new)
        changed = _changed(func, args, kwargs)
        name = func.name().partition(".")[0]
        if not self.recording or not (new or changed) or is_free(name.removeprefix("aten::")):
            return
        cast = name in ("aten::_to_copy", "aten::copy_") and bool(outputs)
        if cast:
            source = inputs[-1]
            if name == "aten::_to_copy" and source.dtype == outputs[0].dtype and _same_layout(source, outputs[0]):
                return  # C++ did not know that it is on the device already
            cast = source.dtype != outputs[0].dtype
        cost = cost_of(func, args, kwargs, result, changed, new)
        self.traced.calls.append(Call(name, cost, cost.dtype or products_dtype(args), cast))

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def dropped(_: object) -> None:
            del self._known[key]
            self._live -= size

        self._known[key] = (weakref.ref(storage, dropped), size)
        self._live += size
        self.traced.peak = max(self.traced.peak, self._live)


def _same_layout(one: Tensor, other: Tensor) -> bool:
    return one.stride() == other.stride()


def _changed(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that a call writes to."""
    found: list[Tensor] = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            found += tensors_in(value)
    return found
