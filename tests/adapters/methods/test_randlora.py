"""RandLoRA: equation 4, its options, its rank."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from randlora_pl.adapters import Adapter, LoRA, RandLoRA, delta_weights, inject, trainable_parameters
from randlora_pl.adapters.methods.randlora import RandLoRADelta
from randlora_pl.adapters.random_bases import Distribution, WeightShape, draw
from randlora_pl.utils.errors import UserError
from tests.adapters import reference
from tests.adapters.cases import One, assert_close
from tests.support.products import in_one_item


def shape(out_features: int, in_features: int, layer: str = "fc") -> WeightShape:
    return WeightShape(layer, out_features, in_features)


def random_delta(in_features: int, out_features: int, **options: Any) -> tuple[RandLoRADelta, Tensor]:
    """The update of one float64 layer with normal lambdas and gammas."""
    model = One(in_features, out_features).double()
    inject(model, RandLoRA(**options), ["fc"])
    for value in trainable_parameters(model).values():
        nn.init.normal_(value)
    delta = model.fc.delta
    assert isinstance(delta, RandLoRADelta)
    return delta, delta_weights(model)["fc"]


def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix))


# The equation


@settings(max_examples=30, derandomize=True)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from(["equation", "peft"]),
    st.sampled_from(["uniform", "normal", "binary", "ternary", "hadamard"]),
    st.sampled_from(["auto", "signs"]),
)
def test_equals_the_slow_loop_for_any_shape(
    in_features: int, out_features: int, r: int, count: int, pairing: Any, basis: Any, a_basis: Any
) -> None:
    r = min(r, in_features, out_features)
    options = {"num_bases": count, "pairing": pairing, "basis": basis, "a_basis": a_basis}
    delta, update = random_delta(in_features, out_features, rank=r, **options)
    assert a_basis == "auto" or (delta.bases.A.abs() == 1).all()
    weight = torch.zeros(out_features, in_features)
    assert torch.allclose(update, reference.adapted_weight(delta, weight), rtol=1e-12, atol=1e-12)


def test_bases_are_slices_of_one_pair_at_the_largest_size() -> None:
    model = nn.ModuleDict({"small": nn.Linear(6, 10), "wide": nn.Linear(30, 8)})
    inject(model, RandLoRA(rank={"small": 2, "wide": 3}, seed=9), [".*"])
    small, wide = model["small"].delta, model["wide"].delta
    assert isinstance(small, RandLoRADelta)
    assert isinstance(wide, RandLoRADelta)
    assert small.bases is wide.bases
    uniform, cpu = Distribution("uniform"), torch.device("cpu")
    assert torch.equal(small.bases.A, draw(9, "A", 1, 3, 8, uniform, cpu))
    assert torch.equal(small.bases.B, draw(9, "B", 3, 30, 3, uniform, cpu).permute(1, 0, 2))
    # A layer's update is the same beside other layers as alone.
    alone = One(6, 10)
    inject(alone, RandLoRA(rank=2, seed=9), ["fc"])
    values = torch.randn_like(small.gammas)
    with torch.no_grad():
        small.gammas.copy_(values)
        alone.fc.delta.gammas.copy_(values)  # type: ignore[union-attr]
    assert_close(delta_weights(model)["small"], delta_weights(alone)["fc"], 1e-6)


@in_one_item(("init", "zero", "constant"), [("gamma", "gammas", "lambdas"), ("lambda", "lambdas", "gammas")])
def test_initial_values(init: Any, zero: str, constant: str) -> None:
    model = One(20, 12)
    inject(model, RandLoRA(rank=5, init=init), ["fc"])
    delta = model.fc.delta
    assert delta.lambdas.shape == (3, 5)  # type: ignore[union-attr]
    assert delta.gammas.shape == (3, 12)  # type: ignore[union-attr]
    assert not getattr(delta, zero).any()
    expected = {"lambdas": 1 / max(3, 5), "gammas": 1 / max(3, 12)}[constant]
    assert torch.equal(getattr(delta, constant), torch.full_like(getattr(delta, constant), expected))


def test_alpha_over_rank_scales_the_update() -> None:
    updates = []
    for alpha in (1.0, 10.0, {"fc": 5.0}, {".*": 10.0, "fc": 1.0}):
        torch.manual_seed(1)
        updates.append(random_delta(8, 12, rank=4, alpha=alpha)[1])
    for update, factor in zip(updates, (1.0, 10.0, 5.0, 10.0), strict=True):
        assert_close(update, factor * updates[0], 1e-12)
    torch.manual_seed(1)
    delta, update = random_delta(8, 12, rank=4)
    assert delta.scaling == 10.0 / 4


# Rank


@settings(max_examples=60, derandomize=True)
@given(
    st.integers(1, 14),
    st.integers(1, 14),
    st.integers(1, 14),
    st.sampled_from(["ceil", "floor+1", 1, 2, 3]),
    st.sampled_from(["uniform", "normal", "binary", "hadamard"]),
    st.sampled_from(["equation", "peft"]),
    st.integers(0, 5),
)
def test_the_rank_is_the_smaller_of_d_and_n_r(
    in_features: int, out_features: int, r: int, num_bases: Any, basis: Any, pairing: Any, seed: int
) -> None:
    small = min(in_features, out_features)
    r = min(r, small)
    if basis == "binary":  # with room enough, see the next test
        in_features, out_features, small, r = in_features + 40, out_features + 40, small + 40, max(r, 5)
    delta, update = random_delta(
        in_features, out_features, rank=r, num_bases=num_bases, basis=basis, pairing=pairing, seed=seed
    )
    assert rank(update) == min(small, delta.lambdas.numel())


@in_one_item("seed", range(4))
@in_one_item("r", [1, 2, 3, 6])
def test_a_binary_a_of_few_rows_has_too_few_kinds_of_columns(r: int, seed: int) -> None:
    """Columns of A that are equal up to sign reach the same n vectors, so no more than n of them count."""
    delta, update = random_delta(64, 80, rank=r, basis="binary", seed=seed)
    a = delta.bases.A[0]
    kinds = (a * a[0]).T.unique(dim=0, return_counts=True)[1]
    expected = int(kinds.clamp(max=len(delta.lambdas)).sum())
    assert rank(update) == expected <= 64
    assert expected == 64 or r in (2, 3)


@in_one_item(("variant", "expected"), [("full", 16), ("a", 4), ("b", 8)])
def test_the_rank_of_the_variants(variant: Any, expected: int) -> None:
    model = One(16, 24).double()
    inject(model, RandLoRA(rank=4, variant=variant), ["fc"])
    for value in trainable_parameters(model).values():
        nn.init.normal_(value)
    assert rank(delta_weights(model)["fc"]) == expected


@pytest.mark.parametrize(
    ("sides", "adapter", "free", "trained"),
    [
        ((16, 12), RandLoRA(rank=2, variant="a", num_bases=7), 2 * 12 + 7 * 2 - 2, 7 * (2 + 12)),
        ((16, 12), RandLoRA(rank=3), 4 * (3 + 12) - 4, 4 * (3 + 12)),
        *(
            pytest.param((64, 48), *row, marks=pytest.mark.slow)
            for row in (
                (RandLoRA(rank=8, variant="a", num_bases=31), 624, 1736),
                (RandLoRA(rank=3, variant="b"), 400, 408),
                (LoRA(rank=8), 832, 896),
            )
        ),
    ],
)
def test_most_numbers_of_variant_a_are_not_free(
    sides: tuple[int, int], adapter: Adapter, free: int, trained: int
) -> None:
    """The rank of the Jacobian of the update, between random directions on either side.

    The update is linear in each factor, so that central differences are exact.
    """
    model = One(sides[1], sides[0]).double()
    inject(model, adapter, ["fc"])
    start = [nn.init.normal_(value) for value in trainable_parameters(model).values()]
    assert sum(each.numel() for each in start) == trained

    def moved(directions: list[Tensor]) -> Tensor:
        for value, direction in zip(start, directions, strict=True):
            value += direction
        return delta_weights(model)["fc"].flatten()

    count, columns = free + 20, []
    with torch.no_grad():
        for _ in range(count):
            step = [torch.randn_like(each) for each in start]
            above, below = moved(step), moved([-2 * each for each in step])
            columns.append(above - below)
            moved(step)
        seen = torch.randn(count, sides[0] * sides[1], dtype=torch.float64) @ torch.stack(columns, 1)
    assert int(torch.linalg.matrix_rank(seen, rtol=1e-10)) == free


@in_one_item(("init", "expected"), [("gamma", 24), ("lambda", 4)])
def test_the_rank_of_the_first_update(init: Any, expected: int) -> None:
    model = One(24, 24).double()
    inject(model, RandLoRA(rank=4, init=init), ["fc"])
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.1)
    model(torch.randn(100, 24, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert rank(delta_weights(model)["fc"]) == expected


@in_one_item("sparsity", [6, "sqrt", 100, 200])
def test_a_sparse_a_loses_the_columns_where_it_is_zero(sparsity: Any) -> None:
    delta, update = random_delta(768, 768, rank=6, basis="ternary", sparsity=sparsity, a_basis="same")
    alive = (delta.bases.A[0] != 0).any(dim=0)
    assert rank(update) == int(alive.sum())
    assert not update[:, ~alive].any()
    s = math.sqrt(768) if sparsity == "sqrt" else sparsity
    share = 1 - (1 - 2 / s) ** 6
    assert abs(int(alive.sum()) - 768 * share) < 5 * math.sqrt(768 * share * (1 - share))


@in_one_item(("sparsity", "a_basis"), [(6, "uniform"), ("sqrt", "auto")])
def test_a_dense_a_restores_the_full_rank(sparsity: Any, a_basis: Any) -> None:
    delta, update = random_delta(768, 768, rank=6, basis="ternary", sparsity=sparsity, a_basis=a_basis)
    assert rank(update) == 768
    assert delta.bases.A.all()
    assert (delta.bases.A.abs() == 1).all() == (a_basis == "auto")
    assert (delta.bases.B == 0).float().mean() > 0.6


def test_dense_bases_have_full_rank_at_the_size_of_a_real_layer() -> None:
    assert rank(random_delta(768, 768, rank=6)[1]) == 768


# Counts


@in_one_item(
    ("options", "expected"),
    [
        ({}, 128 * (6 + 768)),
        ({"num_bases": "floor+1"}, 129 * (6 + 768)),
        ({"num_bases": 7}, 7 * (6 + 768)),
        ({"rank": 5}, 154 * (5 + 768)),
        ({"rank": 5, "num_bases": "floor+1"}, 154 * (5 + 768)),
        ({"rank": 3, "variant": "b"}, 128 * (3 + 768)),
        ({"rank": 3, "variant": "b", "num_bases": "floor+1"}, 129 * (3 + 768)),
        ({"rank": 32, "variant": "a"}, 124 * (32 + 768)),  # nearest to the 99,072 of the full method at rank 6
        ({"rank": 32, "variant": "a", "matched_rank": 12}, 62 * (32 + 768)),
    ],
)
def test_counts_of_one_matrix(options: dict[str, Any], expected: int) -> None:
    adapter = RandLoRA(**options)
    for one in (shape(2304, 768), shape(768, 3072)):
        assert adapter.count(one) == expected
    model = nn.Linear(768, 2304, device="meta")
    assert inject(model, adapter).trainable == expected


# Memory


@in_one_item("autocast", [False, True])
@in_one_item("lower_rank", [False, True])
def test_the_backward_pass_keeps_only_small_tensors(autocast: bool, lower_rank: bool) -> None:
    """Protocol, section 8: memory of a layer is O(n (r + d)) beside the shared bases, not O(n r d)."""
    model = nn.ModuleDict({"fc": nn.Linear(64, 256), "other": nn.Linear(64, 256)})
    inject(model, RandLoRA(rank={"fc": 4 if lower_rank else 8, "other": 8}), [".*"])
    delta = model["fc"].delta
    assert isinstance(delta, RandLoRADelta)
    shared = {buffer.untyped_storage().data_ptr() for buffer in delta.bases.buffers()}
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if tensor.untyped_storage().data_ptr() in shared else tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = delta.change(torch.empty(0))
        assert result.shape == (256, 64)
    assert kept <= 2 * (delta.lambdas.numel() + delta.gammas.numel())
    result.float().square().sum().backward()


# Errors


@in_one_item(
    ("options", "message"),
    [
        ({"basis": "gaussian"}, "basis is 'gaussian'. Set uniform, normal, binary, ternary or hadamard"),
        ({"init": "zero"}, "init is 'zero'. Set gamma or lambda"),
        ({"pairing": "official"}, "pairing is 'official'. Set equation or peft"),
        ({"variant": "c"}, "variant is 'c'. Set full, a or b"),
        ({"num_bases": 0}, "num_bases is 0. Set a positive whole number"),
        ({"num_bases": "floor"}, "num_bases is 'floor'"),
        ({"sparsity": 1}, "sparsity is 1"),
        ({"memory": "high"}, "memory is 'high'. Set auto, low or fast"),
        ({"matched_rank": 0}, "matched_rank is 0"),
        ({"qkv": "joint"}, "qkv is 'joint'. Set packed or split"),
        ({"dropout": 1.0}, "dropout is 1.0. Set a number from 0 to below 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
    ],
)
def test_options_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RandLoRA(**options)


@in_one_item("value", [0, -1, 2.0, "6", True, None])
def test_a_rank_must_be_a_positive_whole_number(value: Any) -> None:
    with pytest.raises(UserError, match="RandLoRA"):
        RandLoRA(rank=value).count(shape(8, 8))


def test_a_rank_above_the_smaller_side_names_the_layer() -> None:
    with pytest.raises(UserError, match=r"blocks.0.fc"):
        RandLoRA(rank=9).count(shape(12, 8, "blocks.0.fc"))
    assert RandLoRA(rank=8).count(shape(12, 8)) == 16
