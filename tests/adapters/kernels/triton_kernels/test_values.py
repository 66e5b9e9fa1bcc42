"""Every kernel in Triton's interpreter against the slow equation, and as an operator of PyTorch."""

import itertools
from typing import Any

import pytest
import torch

from tests.adapters.kernels.triton_kernels.cases import (
    BLOCKS,
    DENSE,
    MIXED,
    SHAPES,
    TERNARY,
    TOLERANCE,
    Call,
    Shape,
    calls,
)
from tests.support.products import in_one_item, marked

pytest.importorskip("triton")

FEW = [(name, list(TOLERANCE)[i % 3], i % 2 == 1) for i, name in enumerate(list(SHAPES)[:-2])]


@in_one_item(("name", "dtype", "peft"), FEW)
def test_kernels_compute_the_equation(name: str, dtype: torch.dtype, peft: bool) -> None:
    for kind in (DENSE, BLOCKS, TERNARY, *([MIXED] if name.startswith(("tiny", "odd")) else [])):
        for call in calls(SHAPES[name], dtype, peft, kind):
            call.check()


@pytest.mark.full
@pytest.mark.parametrize("dtype", TOLERANCE)
@in_one_item(("name", "peft"), itertools.product(SHAPES, (False, True)))
def test_kernels_compute_the_equation_everywhere(name: str, dtype: torch.dtype, peft: bool) -> None:
    for call in calls(SHAPES[name], dtype, peft, seed=1):
        call.check()


# Operators of PyTorch: schemas, fakes, compilation


pytest.importorskip("triton")


def every_operator(shape: Shape) -> list[Call]:
    """One call of each operator."""
    return list({call.operator._qualname: call for call in calls(shape, torch.bfloat16, False)}.values())


@pytest.mark.parametrize(
    ("checks",),
    marked(
        [(("test_schema", "test_faketensor"),), (("test_autograd_registration", "test_aot_dispatch_dynamic"),)],
        lambda row: "test_schema" in row[0],
    ),
)
def test_operators_have_right_schemas_and_fakes(checks: tuple[str, ...]) -> None:
    found = every_operator(Shape(2, 3, 20, 8))
    assert len(found) == 9
    for call in found:
        torch.library.opcheck(call.operator, call.args, test_utils=checks)


def test_operators_are_compiled_as_one_graph() -> None:
    found = every_operator(Shape(2, 3, 20, 8))

    def all_of_them(args: list[tuple[Any, ...]]) -> list[Any]:
        return [call.operator(*each) for call, each in zip(found, args, strict=True)]

    args = [call.args for call in found]
    compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")(args)
    for one, other in zip(compiled, all_of_them(args), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
