"""RandLoRA: equation 4, its options, its rank."""

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from randlora_pl.adapters import Adapter, LoRA, RandLoRA, delta_weights, inject, trainable_parameters
from randlora_pl.adapters.methods.randlora import RandLoRADelta
from randlora_pl.adapters.random_bases import Distribution, WeightShape, draw
from tests.adapters import reference
from tests.adapters.cases import adapted_one, assert_close
from tests.support.products import in_one_item


def shape(out_features: int, in_features: int, layer: str = "fc") -> WeightShape:
    return WeightShape(layer, out_features, in_features)


def random_delta(in_features: int, out_features: int, **options: Any) -> tuple[RandLoRADelta, Tensor]:
    """The update of one float64 layer with normal lambdas and gammas."""
    model, delta = adapted_one(RandLoRA(**options), in_features, out_features, torch.float64)
    for value in trainable_parameters(model).values():
        nn.init.normal_(value)
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
    assert small.bases is wide.bases
    uniform, cpu = Distribution("uniform"), torch.device("cpu")
    assert torch.equal(small.bases.A, draw(9, "A", 1, 3, 8, uniform, cpu))
    assert torch.equal(small.bases.B, draw(9, "B", 3, 30, 3, uniform, cpu).permute(1, 0, 2))


@in_one_item("basis", ["uniform", "hadamard"])
def test_a_layer_is_the_same_beside_larger_ones_and_another_with_another_seed(basis: Any) -> None:
    updates = []
    for layers, seed in (({"one": (12, 36)}, 0), ({"one": (12, 36), "two": (60, 20)}, 0), ({"one": (12, 36)}, 1)):
        model = nn.ModuleDict({name: nn.Linear(*sides) for name, sides in layers.items()})
        inject(model, RandLoRA(rank=5, basis=basis, seed=seed), [".*"])
        with torch.no_grad():
            model["one"].delta.gammas.fill_(1.0)  # type: ignore[union-attr, operator]
        updates.append(delta_weights(model)["one"])
    assert torch.equal(updates[0], updates[1])
    assert (updates[0] - updates[2]).abs().max() > 0.1


@in_one_item(("init", "zero", "constant"), [("gamma", "gammas", "lambdas"), ("lambda", "lambdas", "gammas")])
def test_initial_values(init: Any, zero: str, constant: str) -> None:
    _, delta = adapted_one(RandLoRA(rank=5, init=init), 20, 12)
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


@settings(max_examples=30, derandomize=True)
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
    assert rank(random_delta(16, 24, rank=4, variant=variant)[1]) == expected


@in_one_item(
    ("adapter", "free", "trained"),
    [
        (RandLoRA(rank=2, variant="a", num_bases=7), 2 * 12 + 7 * 2 - 2, 7 * (2 + 12)),
        (RandLoRA(rank=3), 4 * (3 + 12) - 4, 4 * (3 + 12)),
        (RandLoRA(rank=3, variant="b"), 2 * (3 + 12) - 2, 2 * (3 + 12)),
        (LoRA(rank=2), 2 * (16 + 12) - 2 * 2, 2 * (16 + 12)),
    ],
)
def test_most_numbers_of_variant_a_are_not_free(adapter: Adapter, free: int, trained: int) -> None:
    """The rank of the Jacobian of the update."""
    model, delta = adapted_one(adapter, 12, 16, torch.float64)
    values = [nn.init.normal_(value) for value in trainable_parameters(model).values()]
    assert sum(each.numel() for each in values) == trained
    entries = delta.change(torch.empty(0)).flatten()
    rows = [torch.autograd.grad(entry, values, retain_graph=True) for entry in entries]
    jacobian = torch.stack([torch.cat([each.flatten() for each in row]) for row in rows])
    assert int(torch.linalg.matrix_rank(jacobian, rtol=1e-10)) == free


@in_one_item(("init", "expected"), [("gamma", 24), ("lambda", 4)])
def test_the_rank_of_the_first_update(init: Any, expected: int) -> None:
    model, _ = adapted_one(RandLoRA(rank=4, init=init), 24, 24, torch.float64)
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
        ({"num_bases": 7}, 7 * (6 + 768)),
        ({"rank": 5, "num_bases": "floor+1"}, 154 * (5 + 768)),
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
