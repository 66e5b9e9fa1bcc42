from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from randlora_pl.adapters import RandLoRA, delta_weights, inject, merge
from randlora_pl.adapters.kernels.basis_product import Sparse, Stored, stored
from randlora_pl.adapters.random_bases import Copies
from randlora_pl.utils.device import choose_as_on_cuda
from tests.adapters.cases import One, adapted_one, assert_close, bases_of
from tests.support.products import in_one_item


def drawn(seed: int, rows: int, count: int, rank: int, sparsity: int) -> torch.Tensor:
    words = torch.rand(rows, count, rank, generator=torch.Generator().manual_seed(seed))
    return ((words < 1 / sparsity).to(torch.int8)) - (words > 1 - 1 / sparsity).to(torch.int8)


@given(
    st.integers(0, 1000), st.integers(1, 40), st.integers(1, 6), st.integers(1, 5), st.integers(1, 140),
    st.integers(0, 140), st.sampled_from([2, 12, 28, 100, 10_000]),
)  # fmt: skip
def test_additions_give_the_dense_products(
    seed: int, large: int, count: int, rank: int, small: int, tokens: int, sparsity: int
) -> None:
    """For rows and columns with many entries and with none, on a slice of larger bases."""
    b = drawn(seed, large + 2, count + 1, rank + 1, sparsity)
    sparse, slow = Sparse(b, large, count, rank, Copies()), b[:large, :count, :rank].flatten(1).double()
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight, stack, x = random(large, small), random(count * rank, small), random(tokens, large)
    projected, built = random(tokens, count * rank), weight.double() + slow @ stack.double()
    for fast, plain in [
        (sparse.add_to(weight.clone(), stack, False), built),
        (sparse.add_to(weight.T.clone(), stack, True), built.T),
        (sparse.reduce(weight), slow.T @ weight.double()),
        (sparse.reduce(weight.T.contiguous().T), slow.T @ weight.double()),
        (sparse.project(x), x.double() @ slow),
        (sparse.expand(projected), projected.double() @ slow.T),
        (sparse.expand(projected, x.clone()), x.double() + projected.double() @ slow.T),
    ]:
        assert fast.dtype == torch.float32 and fast.shape == plain.shape
        torch.testing.assert_close(fast.double(), plain, rtol=1e-5, atol=1e-5)
    for dtype in (torch.float64, torch.bfloat16):  # dense
        dense = Stored(b, large, count, rank)
        assert torch.equal(sparse.project(x.to(dtype)), dense.project(x.to(dtype)))
        assert torch.equal(sparse.reduce(weight.to(dtype)), dense.reduce(weight.to(dtype)))
        assert torch.equal(sparse.expand(projected.to(dtype)), dense.expand(projected.to(dtype)))
        weights = weight.to(dtype), weight.to(dtype)
        assert torch.equal(
            *(each.add_to(w, stack.to(dtype), False) for each, w in zip((sparse, dense), weights, strict=True))
        )


def layer(sparsity: Any, out_features: int = 96, in_features: int = 64, **options: Any) -> One:
    torch.manual_seed(0)
    model, _ = adapted_one(RandLoRA(rank=4, basis="ternary", sparsity=sparsity, **options), in_features, out_features)
    for parameter in (model.fc.delta.lambdas, model.fc.delta.gammas):
        torch.nn.init.normal_(parameter)
    return model


def kind(model: One) -> type:
    delta = model.fc.delta
    return type(delta.basis())


def test_lists_are_for_sparse_bases_in_float32_on_a_cpu_outside_of_compilers() -> None:
    assert kind(layer(12)) is kind(layer(28)) is Sparse
    assert kind(layer(6)) is Stored
    assert kind(layer(28).double()) is Stored
    with torch.autocast("cpu", torch.bfloat16):
        assert kind(layer(28)) is Stored
    with choose_as_on_cuda():
        assert kind(layer(28)) is Stored
    assert kind(layer(28).to("meta")) is Stored
    compiled, x = torch.compile(layer(28), fullgraph=True, backend="eager"), torch.randn(5, 64)
    assert_close(compiled(x), layer(28)(x), 1e-4)
    assert type(stored(drawn(0, 96, 5, 4, 28).float(), 96, 5, 4, Copies(), torch.float32)) is Stored


def test_layers_share_lists_of_the_stated_size_which_no_file_has() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(768, 768) for _ in range(3)))
    inject(model, RandLoRA(rank=6, basis="ternary", sparsity=28))
    x = torch.randn(4, 768, requires_grad=True)
    model(x).sum().backward()
    (bases,) = bases_of(model)
    made = {key: value for key, value in bases.copies._made.items() if key != "entries"}
    assert len(made) == 4 and not any("copies" in name for name in model.state_dict())
    entries = int((bases.B != 0).sum())
    size = sum(value.numel() * value.element_size() for value in made.values())
    assert size == 8 * entries + 2 * 4 * (768 + 768 + 1)
    assert size / bases.B.numel() == pytest.approx(16 / 28, rel=0.05)


@in_one_item(("shape", "tokens", "options"), [
    ((96, 64), 300, {}), ((64, 96), 300, {"memory": "low"}), ((64, 64), 3, {}), ((96, 64), 3, {"dropout": 0.1}),
    ((64, 96), 300, {"dropout": 0.1, "pairing": "peft"}), ((64, 96), 2, {}),
])  # fmt: skip
def test_a_layer_gives_the_numbers_and_gradients_of_dense_products(
    shape: tuple[int, int], tokens: int, options: dict[str, Any]
) -> None:
    model = layer(12, *shape, **options)
    (bases,) = bases_of(model)
    results = []
    x = torch.randn(tokens, shape[1], requires_grad=True)
    for expected in (Sparse, Stored):
        assert kind(model) is expected
        torch.manual_seed(1)
        output = model(x)
        values = [x, model.fc.delta.lambdas, model.fc.delta.gammas]
        results.append((output, *torch.autograd.grad(output.square().mean(), values), delta_weights(model)["fc"]))
        bases.B = bases.B.float()
    for sparse, dense in zip(*results, strict=True):
        assert_close(sparse, dense, 1e-4)
    x = x.detach()
    before = model.eval()(x)
    merge(model)
    assert_close(model(x), before, 1e-4)
