"""The kernels as operators of PyTorch: schemas, fakes, compilation; and their costs, counted in the interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from randlora_pl.adapters.kernels.triton_kernels.costs import COSTS
from tests.adapters.kernels.triton_kernels.cases import Call, Shape, calls

pytest.importorskip("triton")


def every_operator(shape: Shape) -> list[Call]:
    """One call of each operator."""
    return list({call.operator._qualname: call for call in calls(shape, torch.bfloat16, False)}.values())


def test_operators_have_right_schemas_and_fakes() -> None:
    found = every_operator(Shape(2, 3, 20, 8))
    assert {call.operator._qualname for call in found} == set(COSTS)
    for call in found:
        torch.library.opcheck(call.operator, call.args)


def test_operators_are_compiled_as_one_graph() -> None:
    found = every_operator(Shape(2, 3, 20, 8))

    def all_of_them(args: list[tuple[Any, ...]]) -> list[Any]:
        return [call.operator(*each) for call, each in zip(found, args, strict=True)]

    args = [call.args for call in found]
    compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")(args)
    for one, other in zip(compiled, all_of_them(args), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class Counter:
    """Bytes at different addresses that kernels read and wrote, and at all of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.read: dict[int, int] = {}
        self.written: dict[int, int] = {}
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def loaded(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            self._add(self.read, ptrs, mask)
            return load(builder, ptrs, mask, *rest)

        def stored(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._add(self.written, ptrs, mask)
            return store(builder, ptrs, value, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", loaded)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", stored)

    @staticmethod
    def _add(found: dict[int, int], ptrs: Any, mask: Any) -> None:
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        found.update(dict.fromkeys(ptrs.data[mask.data].ravel().tolist(), size))


def test_formulas_of_costs_are_what_kernels_load_and_store(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter(monkeypatch)
    for shape in (Shape(3, 5, 70, 33), Shape(5, 12, 150, 48)):
        for call in calls(shape, torch.bfloat16, True):
            counter.read.clear()
            counter.written.clear()
            result = call.operator(*call.args)
            cost = COSTS[call.operator._qualname](call.args, result)
            assert sum(counter.read.values()) == cost.read, call.operator
            assert sum(counter.written.values()) == cost.written, call.operator
            assert cost.launches == (2 if any(cost.summed) else 1)
            if cost.summed[0]:
                first = result[0] if isinstance(result, tuple) else result
                assert cost.summed[1] == first.numel() * first.element_size()


def test_formulas_count_operations() -> None:
    b = torch.zeros(70, 15)
    args = (None, b, torch.zeros(3, 5), torch.zeros(3, 33), torch.zeros(5, 33))
    assert COSTS["randlora::build_weight"](args, torch.zeros(70, 33)).flops == 2 * 70 * 15 * 33
    tokens, h = torch.zeros(9, 128), torch.zeros(64, 64)
    signs: Tensor = torch.zeros(128, dtype=torch.int8)
    assert COSTS["randlora::hadamard_project"]((tokens, signs, h, 128), tokens).flops == 2 * 9 * 128 * 64
