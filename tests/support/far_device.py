"""A device that is far away: tensors with a device of their own, computed on the CPU, and a count of what waits for it.

Code sees tensors of another device than the CPU and chooses what it does on a GPU. Every operation that makes the host
wait for a real GPU is recorded with the lines of this project that called it. PyTorch registers the device for the
whole process, so that `use` belongs into a process of its own.
"""

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import randlora_pl

NAME = "far"
SIZES_FROM_VALUES = (
    "nonzero", "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "bincount",
    "repeat_interleave", "equal", "is_nonzero", "_linalg_check_errors",
)  # fmt: skip
"""Operations that read values to know a size or an answer."""
PACKAGE = Path(randlora_pl.__file__).parent


class FarTensor(Tensor):
    """A tensor on the device; ``here`` has its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls: type, here: Tensor) -> "FarTensor":
        made: FarTensor = Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            layout=here.layout, device=f"{NAME}:0",
        )  # fmt: skip
        made.here = here
        return made

    def tolist(self) -> Any:
        WAITS.add("tolist")
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Waits:
    """What makes the host wait, while it is ``on``: the operation and the innermost line of the project's code."""

    def __init__(self) -> None:
        self.on = False
        self.seen: Counter[str] = Counter()

    def add(self, what: str) -> None:
        if not self.on:
            return
        lines = [f for f in traceback.extract_stack() if "torch" not in f.filename and f.filename != __file__]
        own = [f for f in lines if Path(f.filename).is_relative_to(PACKAGE)] or lines
        frame = own[-1]
        place = "/".join(Path(frame.filename).parts[-3:])
        self.seen[f"{what} in {place}:{frame.lineno} {frame.name}"] += 1


WAITS = Waits()


class _Far(TorchDispatchMode):
    """Makes tensors on the device where code asks for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU; results are on the device if an argument is, or if it is asked for."""
    tensors: list[Tensor] = []
    _mapped(tensors.append, (args, kwargs))
    was_far = is_far = any(isinstance(each, FarTensor) for each in tensors)
    asked = kwargs.get("device")
    if asked is not None:
        is_far = torch.device(asked).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    name = func._schema.name.removeprefix("aten::")
    if name == "copy_":
        ends = [isinstance(each, FarTensor) for each in args[:2]]
        _copied(ends[1], ends[0], (len(args) > 2 and args[2]) or kwargs.get("non_blocking"))
    elif name in ("_to_copy", "to"):
        _copied(was_far, is_far, kwargs.pop("non_blocking", False))
    elif name == "_local_scalar_dense":
        is_far = False
        if was_far:
            WAITS.add("item")
    elif was_far and name in SIZES_FROM_VALUES:
        WAITS.add(name)
    elif was_far and name.startswith(("index", "_index_put", "_unsafe_index")):
        _indexed(name, args)
    here = _mapped(lambda each: each.here if isinstance(each, FarTensor) else each, (args, kwargs))
    result = func(*here[0], **here[1])
    if not is_far and not (name.endswith("_") and was_far):
        return result
    known = {id(each.here): each for each in tensors if isinstance(each, FarTensor)}
    return _mapped(lambda each: known[id(each)] if id(each) in known else FarTensor(each), result)


def _mapped(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Return arguments or results with other tensors, as `tree_map` does in five times the time."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_mapped(change, each) for each in value])
    return {key: _mapped(change, each) for key, each in value.items()} if isinstance(value, dict) else value


def _copied(source: bool, target: bool, non_blocking: Any) -> None:
    if source != target and not non_blocking:
        WAITS.add("copy to the device" if target else "copy to the host")


def _indexed(name: str, args: Any) -> None:
    indices = args[1] if isinstance(args[1], list | tuple) else ()
    masks = [each for each in indices if isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8)]
    if masks and not ("put" in name and args[2].numel() == 1):  # else it fills
        WAITS.add("boolean index")
    if any(isinstance(each, Tensor) and not isinstance(each, FarTensor) and each.dim() for each in indices):
        WAITS.add("copy of indices to the device")


class Event:
    """An event of the device, which is always over."""

    def record(self, *_: Any) -> None:
        """Do nothing: computing is done at once."""

    def query(self) -> bool:
        """Return True."""
        return True

    def synchronize(self) -> None:
        """Do nothing. The host does not wait for what was asked for a step before."""


class FarAccelerator(CPUAccelerator):
    """The device for Lightning."""

    def setup_device(self, device: torch.device) -> None:
        """Accept it."""

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """Return the only one."""
        return [torch.device(NAME, 0)]


def use() -> None:
    """Register the device, and use it from now on."""
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

    class Module(_DummyBackendModule):  # type: ignore[misc]
        Event = Event

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.float16, torch.bfloat16]

    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    torch._C._set_only_lift_cpu_tensors(True)
    _Far().__enter__()
