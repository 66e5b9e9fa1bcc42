"""Our bases in PEFT's form: the same update by its pairing, written out one term at a time."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from randlora_pl.adapters import RandLoRA, delta_weights, inject, trainable_parameters
from randlora_pl.adapters.methods.peft_bases import peft_count
from randlora_pl.adapters.methods.randlora import arranged_for_peft
from randlora_pl.adapters.random_bases import WeightShape, exact_pattern, sides
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item


def by_pairs(a: Tensor, b: Tensor, lambdas: Tensor, gammas: Tensor, large: int, small: int) -> Tensor:
    """PEFT's update (M, m) without its scaling: column p of B (M, n, r) goes with row (p // n, p % n)."""
    rank, count = lambdas.shape
    update = torch.zeros(large, small, dtype=torch.float64)
    for p in range(rank * count):
        column = b[:large, p // rank, p % rank].double()
        row = lambdas[p // count, p % count] * a[p // count, 0, :small].double() * gammas[p % count]
        update += column[:, None] * row
    return update


@settings(max_examples=60, derandomize=True)
@given(
    st.integers(2, 9),
    st.integers(2, 9),
    st.integers(1, 4),
    st.sampled_from(["equation", "peft"]),
    st.sampled_from(["uniform", "ternary", "hadamard"]),
    st.sampled_from(["ceil", "floor+1", 1, 2, "b"]),
)
def test_the_arranged_bases_give_our_update(
    outputs: int, inputs: int, rank: int, pairing: Any, basis: Any, bases: Any
) -> None:
    rank = min(rank, outputs, inputs)
    options = {"variant": "b"} if bases == "b" else {"num_bases": bases}
    adapter = RandLoRA(rank=rank, alpha=float(rank), pairing=pairing, basis=basis, **options)
    # Two layers of one smaller side, so that the bases are larger than the first one needs.
    model = nn.ModuleDict(
        {"one": nn.Linear(inputs, outputs), "two": nn.Linear(max(inputs, outputs) + 3, min(inputs, outputs))}
    )
    inject(model.double(), adapter, [".*"])
    for parameter in trainable_parameters(model).values():
        nn.init.normal_(parameter)
    shapes = [WeightShape("one", outputs, inputs), WeightShape("two", min(inputs, outputs), max(inputs, outputs) + 3)]
    delta: Any = model["one"].delta
    count = peft_count(shapes[0].small, rank)
    try:
        a, b = arranged_for_peft(adapter, shapes, delta.bases)
    except UserError:
        assert adapter.bases_of(shapes[0]) > count  # the only reason here
        return
    small, large = sorted(sides(shapes))
    assert a.shape == (rank, 1, small)
    assert b.shape == (large, peft_count(small, rank), rank)
    more = count - len(delta.lambdas)
    lambdas, gammas = (torch.cat([t.detach(), t.new_zeros(more, t.shape[1])]) for t in (delta.lambdas, delta.gammas))
    expected = by_pairs(a, b, lambdas.T, gammas, shapes[0].large, shapes[0].small)
    ours = delta_weights(model)["one"]
    torch.testing.assert_close(ours if outputs >= inputs else ours.T, expected, rtol=1e-5, atol=1e-5)


WIDE, SMALL = WeightShape("a", 20, 12), WeightShape("b", 6, 18)


@in_one_item(
    ("adapter", "shapes", "message"),
    [
        (RandLoRA(rank=3, variant="a"), [WIDE], "variant a is a product of two sums"),
        (RandLoRA(rank=3, lead=2), [WIDE], "it has columns of its own"),
        (RandLoRA(rank={"a": 3, "b": 2}), [WIDE, SMALL], "its layers have ranks 2 and 3; PEFT's RandLoRA has one"),
        (
            RandLoRA(rank=3),
            [WIDE, SMALL],
            "its layers have 2 and 4 bases, and pairing: equation permutes all of them alike",
        ),
        (RandLoRA(rank=3, num_bases="floor+1"), [WIDE], "it has 5 bases of rank 3; PEFT makes 4"),
        (
            RandLoRA(rank=3, num_bases=1, pairing="peft"),
            [WIDE, SMALL],
            "its layers have 1 bases, and num_bases: 1 rearranges all",
        ),
        (
            RandLoRA(rank=3, basis="hadamard", pairing="peft"),
            [WIDE, SMALL],
            "hadamard bases differ for the smaller sides 6 and 12",
        ),
    ],
)  # fmt: skip
def test_what_peft_has_no_bases_for(adapter: RandLoRA, shapes: list[WeightShape], message: str) -> None:
    with pytest.raises(UserError, match=message):
        arranged_for_peft(adapter, shapes, adapter.bases(shapes, torch.device("cpu")))


@settings(max_examples=50, derandomize=True)
@given(st.sets(st.from_regex(r"([a-c]\.)?([0-3]\.){0,2}[d-f](\.[g-h])?", fullmatch=True), min_size=1, max_size=12))
def test_a_pattern_fits_exactly_its_names(names: set[str]) -> None:
    import re

    pattern = re.compile(exact_pattern(sorted(names)))
    others = (
        {f"x.{name}" for name in names} | {f"{name}x" for name in names} | {name.replace("0", "9") for name in names}
    )
    others |= {name.replace("d", "e") for name in names} | {name.replace("1", "2") for name in names}
    assert all(pattern.fullmatch(name) for name in names)
    assert not any(pattern.fullmatch(name) for name in others - names)


def test_a_pattern_is_short() -> None:
    names = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("fc1", "fc2")]
    assert exact_pattern(names) == r"blocks\.(?:0|1)(?:\.fc1|\.fc2)"
