"""The fast path of RandLoRA: the numbers and gradients of the plain product with W0 + delta, and what it keeps."""

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from randlora_pl.adapters import Adapter, LoRA, RandLoRA, trainable_parameters
from randlora_pl.adapters.kernels import basis_product as sum_parts
from randlora_pl.adapters.kernels import common
from randlora_pl.adapters.kernels import randlora_linear as sums
from randlora_pl.adapters.kernels.common import Choice, cheapest
from randlora_pl.adapters.kernels.hadamard import Hadamard
from randlora_pl.adapters.random_bases import Bases, Distribution, draw
from tests.adapters.cases import One, adapted_one, assert_close, bases_of, randomise
from tests.support.products import covered, in_one_item

BASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense-low": {"memory": "low"},
    "peft": {"pairing": "peft"},
    "ternary": {"basis": "ternary", "sparsity": 3, "a_basis": "uniform"},
    "binary": {"basis": "binary"},
    "hadamard": {"basis": "hadamard"},
    "hadamard-fast": {"basis": "hadamard", "memory": "fast", "pairing": "peft"},
}
every_basis = in_one_item("basis", BASES)
SHAPES = [(24, 24), (24, 60), (60, 24), (13, 20), (130, 390), (300, 130)]
# The count never chooses to neither build nor project: two thin products project anyway.
FORMS = [Choice(True, False), Choice(True, True), Choice(False, True)]
DROPOUTS = [0.0, 0.3]


def adapted(
    in_features: int, out_features: int, basis: str, dtype: torch.dtype = torch.float64, dropout: float = 0.0
) -> One:
    model, _ = adapted_one(RandLoRA(rank=5, dropout=dropout, **BASES[basis]), in_features, out_features, dtype)
    randomise(model, 0.5)
    return model


def slow(model: One, x: Tensor) -> Tensor:
    """One plain product, or two with the mask that the layer draws, which autograd differentiates."""
    delta, weight, bias = model.fc.delta, model.fc.weight, model.fc.bias
    if not delta.drops:
        return F.linear(x, delta.effective_weight(weight), bias)
    kept = (~common.drop_mask(x, delta.dropout)).to(x.dtype) * common.keep_scaling(x, delta.dropout)
    return F.linear(x, weight, bias) + F.linear(x * kept, delta.change(torch.empty(0)))


def assert_same(first: Iterable[Tensor], second: Iterable[Tensor]) -> None:
    for fast, plain in zip(first, second, strict=True):
        assert fast.shape == plain.shape
        assert torch.allclose(fast, plain, rtol=1e-10, atol=1e-10)


def differentiated(run: Callable[[Tensor], Tensor], values: list[Tensor]) -> tuple[Tensor, ...]:
    """The output for the first of the values, and its gradients with respect to all that have one."""
    torch.manual_seed(3)
    output = run(values[0])
    chosen = [value for value in values if value.requires_grad]
    assert output.requires_grad == bool(chosen)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return output, *(torch.autograd.grad((output * weights).sum(), chosen) if chosen else ())


def forced(monkeypatch: pytest.MonkeyPatch, form: Choice) -> None:
    """Takes one form whatever it costs."""
    monkeypatch.setattr(sum_parts, "cheapest", lambda *_: form)
    monkeypatch.setattr(sum_parts, "cheapest_alone", lambda *_: form)


# The numbers


@covered(("shape", "form", "basis", "probability"), SHAPES, FORMS, BASES, DROPOUTS)
def test_every_form_gives_the_numbers_and_gradients_of_the_plain_product(
    shape: tuple[int, int], form: Choice, basis: str, probability: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "AT_ONCE", 4)
    model = adapted(*shape, basis, dropout=probability)
    forced(monkeypatch, form)
    model.fc.bias.requires_grad_()
    values = [model.fc.bias, *trainable_parameters(model).values()]
    for size in ((7, 3), (1,), (0,), (), (2, 2, 2)):
        x = torch.randn(*size, shape[0], dtype=torch.float64, requires_grad=True)
        found = differentiated(model, [x, *values])
        assert_same(found, differentiated(lambda entry: slow(model, entry), [x, *values]))
        with torch.no_grad():
            torch.manual_seed(3)
            assert torch.allclose(model(x), found[0], rtol=1e-12, atol=1e-12)


@covered(("needs", "basis"), itertools.product((False, True), repeat=4), BASES, strength=1)
def test_any_part_may_be_frozen(needs: tuple[bool, ...], basis: str) -> None:
    for shape, probability in itertools.product(((24, 60), (60, 24)), DROPOUTS):
        model = adapted(*shape, basis, dropout=probability)
        delta: Any = model.fc.delta
        x = torch.randn(70, shape[0], dtype=torch.float64)
        values = [x, model.fc.bias, delta.lambdas, delta.gammas]
        for value, need in zip(values, needs, strict=True):
            value.requires_grad_(need)
        assert_same(*(differentiated(run, values) for run in (model, partial(slow, model))))


@covered(
    ("counts", "shape", "form", "basis", "probability"),
    ["first", "none", "most", "all"],
    [(24, 60), (60, 24), (24, 24)],
    [None, *FORMS],
    BASES,
    DROPOUTS,
)
def test_tokens_without_a_gradient_are_left_out(
    counts: str,
    shape: tuple[int, int],
    form: Choice | None,
    basis: str,
    probability: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The forward pass takes any form, the backward pass may then take another one for its fewer tokens."""
    model = adapted(*shape, basis, dropout=probability)
    model.fc.bias.requires_grad_()
    x = torch.randn(8, 10, shape[0], dtype=torch.float64, requires_grad=True)
    upper = torch.randn(8, 10, shape[1], dtype=torch.float64)
    upper[:, {"first": slice(1, None), "none": slice(None), "most": slice(7, None), "all": slice(0)}[counts]] = 0
    rows = sums.nonzero_rows(upper.flatten(0, 1))
    assert (rows is None) == (counts in ("most", "all"))
    assert rows is None or rows.tolist() == ([] if counts == "none" else list(range(0, 80, 10)))
    values = [x, model.fc.bias, *trainable_parameters(model).values()]
    torch.manual_seed(3)
    expected = torch.autograd.grad((slow(model, x) * upper).sum(), values)
    with monkeypatch.context() as patch:
        if form:
            forced(patch, form)
        torch.manual_seed(3)
        output = model(x)
    for backward in (None, form or Choice(True, False)):
        if backward:
            forced(monkeypatch, backward)
        assert_same(torch.autograd.grad((output * upper).sum(), values, retain_graph=True), expected)


def test_what_is_left_out_is_not_computed() -> None:
    model = adapted(128, 512, "dense", torch.float32)
    operations = []
    for kept in (50, 1):
        x = torch.randn(16, 50, 128, requires_grad=True)
        output = model(x)
        with FlopCounterMode(display=False) as counter:
            output[:, :kept].square().sum().backward()
        operations.append(counter.get_total_flops())
    assert operations[1] < 0.25 * operations[0]


@every_basis
def test_inputs_may_be_turned_and_strided(basis: str) -> None:
    model = adapted(24, 60, basis)
    for x in (torch.randn(24, 9, dtype=torch.float64).T, torch.randn(4, 3, 48, dtype=torch.float64)[:, :, ::2]):
        results = []
        for run in (model, partial(slow, model)):
            entry = x.detach().requires_grad_()
            output = run(entry)
            gradient = output.detach().transpose(0, -1).contiguous().transpose(0, -1)  # not contiguous either
            values = [entry, *trainable_parameters(model).values()]
            results.append((output, *torch.autograd.grad(output, values, gradient)))
        assert_same(*results)


@every_basis
@pytest.mark.parametrize(("autocast", "probability"), [(False, 0.0), (True, 0.0), (False, 0.3), (True, 0.3)])
def test_bfloat16_keeps_its_dtypes(basis: str, autocast: bool, probability: float) -> None:
    model = adapted(128, 256, basis, torch.float32, probability)
    x = torch.randn(300, 128)
    torch.manual_seed(3)
    exact = model(x).detach()
    if not autocast:
        model.fc.weight.data, model.fc.bias.data = model.fc.weight.bfloat16(), model.fc.bias.bfloat16()
        x = x.bfloat16()
    x.requires_grad_()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(x)
        assert output.dtype == torch.bfloat16
        assert_close(output.float(), exact, 0.03)
        output.float().square().mean().backward()  # also under autocast
    assert x.grad is not None
    assert x.grad.dtype == x.dtype
    twin = adapted(128, 256, basis, torch.float32, probability)
    twin.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    torch.manual_seed(3)
    slow(twin, x.detach().float()).square().mean().backward()
    for name, value in trainable_parameters(model).items():
        assert value.grad is not None
        assert value.grad.dtype == torch.float32
        assert_close(value.grad, twin.get_parameter(name).grad, 0.05)  # type: ignore[arg-type]


# Derivatives


@every_basis
@pytest.mark.parametrize("tokens", [3, 40])
def test_gradients_are_exact_at_few_and_at_many_tokens(basis: str, tokens: int) -> None:
    model = adapted(24, 30, basis)
    delta = model.fc.delta

    def run(x: Tensor, lambdas: Tensor, gammas: Tensor) -> Tensor:
        state = {"fc.delta.lambdas": lambdas, "fc.delta.gammas": gammas}
        return torch.func.functional_call(model, state, (x,))  # type: ignore[no-any-return]

    x = torch.randn(tokens, 24, dtype=torch.float64, requires_grad=True)
    values = [value.detach().clone().requires_grad_() for value in (delta.lambdas, delta.gammas)]
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


def test_a_second_derivative_is_refused() -> None:
    model = adapted(24, 30, "dense")
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.square().sum().backward()


def test_a_frozen_weight_that_is_set_free_gets_its_gradient() -> None:
    model = adapted(24, 30, "hadamard")
    model.fc.weight.requires_grad_()
    x = torch.randn(5, 24, dtype=torch.float64)
    model(x).square().sum().backward()
    fast = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    slow(model, x).square().sum().backward()
    assert "fc.weight" in fast
    assert all(torch.allclose(fast[name], model.get_parameter(name).grad) for name in fast)  # type: ignore[arg-type]


# The count


def test_the_cheaper_form_is_the_one_with_fewer_multiplications() -> None:
    for large, small, inner, width in (
        (768, 768, 768, 768),
        (3072, 768, 770, 770),
        (3072, 768, 768, 64),
        (24, 24, 12, 12),
    ):
        for tokens in (0, 1, 10, 300, 400, 614, 615, 700, 800, 3000, 3200, 10_000):
            b_on_weight, b_on_tokens = small * large * width, tokens * large * width
            built = b_on_weight + tokens * large * small
            thin = tokens * large * small + b_on_tokens + tokens * inner * small
            reduced_first = tokens * large * small + b_on_weight
            projected_first = b_on_tokens + tokens * inner * small
            assert cheapest(tokens, large, small, inner, width) == (built < thin, projected_first < reduced_first)


IN_PLACE: dict[Any, Any] = {  # which the counter does not know
    torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1],
    torch.ops.aten.baddbmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * left[2] * right[2],
}


def unused() -> Tensor:
    raise AssertionError("RandLoRA's update does not depend on the frozen weight")


@covered(
    ("shape", "basis", "trains"),
    [(128, 128), (128, 448), (448, 128)],
    ["dense-low", "hadamard"],
    [False, True],
)
def test_the_update_alone_takes_the_form_that_does_less(shape: tuple[int, int], basis: str, trains: bool) -> None:
    """Counted operations of either form, not the rule's own formula; near the point of balance either will do."""
    chosen = set()
    for tokens in (4, 30, 100, 200, 700, 3000):
        model = adapted(*shape, basis, torch.float32)
        delta = model.fc.delta
        x = torch.randn(tokens, shape[0], requires_grad=trains)
        costs = {}
        for build in (False, True):
            counting = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
            with pytest.MonkeyPatch.context() as patch, counting as counter:
                patch.setattr(sum_parts, "cheapest_alone", lambda *_, build=build: Choice(build, not build))
                with torch.set_grad_enabled(trains):
                    output = delta.contribution(x, unused)
                if trains:
                    output.square().sum().backward()
            costs[build] = counter.get_total_flops()
        form = delta.form()
        build = form.choose(delta.basis(), tokens, True, trains).build
        chosen.add(build)
        assert costs[build] <= 1.05 * costs[not build]
    few_only = (basis == "dense-low" and not trains) or shape == (128, 128)  # one that is large on one side
    assert chosen == ({False, True} if few_only else {False})


@covered(("shape", "build", "basis"), [(24, 60), (60, 24), (24, 24)], [False, True], BASES)
def test_both_forms_of_the_update_alone_agree(
    shape: tuple[int, int], build: bool, basis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sum_parts, "cheapest_alone", lambda *_: Choice(build, not build))
    model = adapted(*shape, basis)
    delta = model.fc.delta
    values = list(trainable_parameters(model).values())
    for size in ((7, 3), (1,), (0,), (30,)):
        x = torch.randn(*size, shape[0], dtype=torch.float64, requires_grad=True)
        found = differentiated(lambda x: delta.contribution(x, unused), [x, *values])
        assert_same(found, differentiated(lambda x: F.linear(x, delta.change(torch.empty(0))), [x, *values]))
        with torch.no_grad():
            assert torch.allclose(delta.contribution(x, unused), found[0], rtol=1e-12, atol=1e-12)


# What is kept and what is done


def kept_bytes(adapter: Adapter, in_features: int, out_features: int, x: Tensor) -> int:
    """Bytes that a layer keeps for its backward pass, its parameters and shared bases excluded."""
    model, _ = adapted_one(adapter, in_features, out_features)
    randomise(model)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(x)
    output.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features"),
    [(20, 1024, 1032), (100, 256, 256), (100, 1024, 256), (1000, 256, 768), (1800, 1024, 256)],
)
def test_no_more_is_kept_than_by_lora(tokens: int, in_features: int, out_features: int) -> None:
    x = torch.randn(tokens, in_features, requires_grad=True)
    sides = in_features, out_features
    lora, kept = kept_bytes(LoRA(rank=32), *sides, x), {}
    for basis, memory in itertools.product(("uniform", "ternary", "hadamard"), ("low", "fast", "auto")):
        kept[basis, memory] = kept_bytes(RandLoRA(rank=6, basis=basis, memory=memory), *sides, x)  # type: ignore[arg-type]
    assert kept["hadamard", "low"] == kept["hadamard", "auto"] <= lora
    assert kept["uniform", "low"] <= 1.02 * lora
    assert kept["ternary", "low"] <= 1.02 * lora
    built = 4 * in_features * out_features
    for basis in ("uniform", "ternary"):
        assert kept[basis, "fast"] <= kept[basis, "low"] + built
        # 258 of 20 * 258 / 3 = 1720 tokens: beyond that, building the weight again adds less than a twentieth.
        assert kept[basis, "auto"] == kept[basis, "low" if tokens > 1720 else "fast"]
    if in_features > out_features:  # the input is kept through the bases, at a quarter of its width
        assert kept["hadamard", "low"] < 0.3 * lora


@every_basis
def test_without_gradients_only_the_product_is_done(basis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("done for nothing")

    for part in ("project", "contract", "reduce"):
        monkeypatch.setattr(Hadamard, part, never)
        monkeypatch.setattr(sum_parts.Stored, part, never)
    model = adapted(60, 24, basis)
    x = torch.randn(100, 60, dtype=torch.float64)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not model(x).requires_grad
    model.requires_grad_(False)
    assert not model(x).requires_grad
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None


# Places where layers live


def test_data_parallel_training_gives_the_same_gradients(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        models = [[adapted(24, 60, basis), adapted(60, 24, basis)] for basis in ("dense", "hadamard", "ternary")]
        models.append([adapted(24, 60, "hadamard")])  # a single int8 tensor in DDP's bucket must have plain strides
        for layers in models:
            model = nn.Sequential(*layers)
            x = torch.randn(50, 24, dtype=torch.float64)
            values = list(trainable_parameters(model).values())
            plain = torch.autograd.grad(model(x).square().sum(), values)
            DistributedDataParallel(model)(x).square().sum().backward()
            for first, value in zip(plain, values, strict=True):
                assert value.grad is not None
                assert torch.equal(first, value.grad)
    finally:
        dist.destroy_process_group()


# Ternary and binary bases in 8 bits


@pytest.mark.parametrize("basis", ["ternary", "binary"])
def test_signs_are_stored_in_8_bits_under_the_fingerprint_of_their_float32_bits(basis: Any) -> None:
    model, _ = adapted_one(RandLoRA(rank=4, basis=basis, sparsity=3, seed=7), 20, 30)
    (shared,) = bases_of(model)
    a, b = (
        draw(7, name, count, rows, columns, Distribution.make(entries, 3, 30), torch.device("cpu"))
        for name, count, rows, columns, entries in (("A", 1, 4, 20, "binary"), ("B", 5, 30, 4, basis))
    )
    assert shared.B.dtype == torch.int8
    assert torch.equal(shared.B.float() * shared.scale, b.permute(1, 0, 2))
    assert shared.fingerprint == Bases(7, a, b).fingerprint
    model.bfloat16()
    assert (shared.B.dtype, shared.A.dtype) == (torch.int8, torch.float32)
