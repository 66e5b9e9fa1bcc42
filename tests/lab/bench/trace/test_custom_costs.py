"""Formulas of custom operators against the loads and stores that Triton's interpreter makes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from randlora_pl.adapters.kernels import triton_kernels
from tests.adapters.kernels.triton_kernels.cases import SHAPES, Shape, calls
from tests.support.products import in_one_item
from tests.support.trace.custom_costs import CUSTOM, size_of
from tests.support.trace.op_costs import tensors_in

pytest.importorskip("triton")


class Addresses:
    """Distinct bytes that kernels load and store, and all those of PyTorch's operators after them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.read: set[tuple[int, int]] = set()
        self.written: set[tuple[int, int]] = set()
        self.more = [0, 0]
        for name, to in (("create_masked_load", "read"), ("create_masked_store", "written")):
            monkeypatch.setattr(InterpreterBuilder, name, self._noting(getattr(InterpreterBuilder, name), to))

    def _noting(self, original: Callable[..., Any], to: str) -> Callable[..., Any]:
        def noted(builder: Any, pointers: Any, *rest: Any) -> Any:
            mask = rest[0] if to == "read" else rest[1]
            size = pointers.get_element_ty().primitive_bitwidth // 8
            getattr(self, to).update((int(address), size) for address in pointers.data[mask.data].ravel())
            return original(builder, pointers, *rest)

        return noted

    def bytes(self) -> tuple[int, int]:
        read, written = (sum(size for _, size in some) for some in (self.read, self.written))
        return read + self.more[0], written + self.more[1]


class After(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts sums and casts in an operator, which PyTorch runs."""

    def __init__(self, found: Addresses) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name().startswith(("aten::sum", "aten::_to_copy")):
            self.found.more[0] += size_of(args[0])
            self.found.more[1] += size_of(result)
        return result


ROWS = [
    ("ViT-B/32: n r = d", torch.float32, False),
    ("odd n r, odd sides", torch.float16, True),
    ("Qwen2: D cut off in a block", torch.float32, False),
]


@pytest.mark.slow
@in_one_item(("name", "dtype", "peft"), ROWS)
def test_formulas_count_the_loads_and_stores_of_the_interpreter(
    name: str, dtype: torch.dtype, peft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _compared(SHAPES[name], dtype, peft)
    assert seen == set(CUSTOM)


def _compared(shape: Shape, dtype: torch.dtype, peft: bool) -> set[str]:
    seen = set()
    for call in calls(shape, dtype, peft):
        operator = call.operator._opoverload
        with pytest.MonkeyPatch.context() as patch:
            found = Addresses(patch)
            result = _inside(call.operator, call.args, found)
        cost = CUSTOM[operator.name()](call.args, result)
        assert found.bytes() == (cost.read, cost.written), operator
        assert (cost.launches > 1) == (found.more != [0, 0])
        seen.add(operator.name())
    return seen


def _inside(operator: Any, args: tuple[Any, ...], found: Addresses) -> Any:
    """Run the code of an operator; a mode outside of it would not see what it calls."""
    with After(found):
        return operator._init_fn(*args)


def test_a_wrong_formula_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CUSTOM["randlora::build_weight"]
    wrong = lambda args, result: right(args, result)._replace(read=sum(map(size_of, tensors_in(list(args)))))  # noqa: E731
    monkeypatch.setitem(CUSTOM, "randlora::build_weight", wrong)
    with pytest.raises(AssertionError, match="build_weight"):
        _compared(SHAPES["tiny"], torch.float32, False)  # B has more columns than are read


def test_every_custom_operator_has_a_formula() -> None:
    defined = {
        value._opoverload.name()
        for value in vars(triton_kernels).values()
        if isinstance(value, torch.library.CustomOpDef)
    }
    assert defined == set(CUSTOM)
