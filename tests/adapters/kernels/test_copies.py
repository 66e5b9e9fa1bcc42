"""Copies of the bases that layers share: made once, never left behind by a tracer, and without effect on the bits."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from randlora_pl.adapters import RandLoRA, inject, trainable_parameters
from randlora_pl.adapters.kernels.basis_product import Stored
from tests.adapters.cases import adapted_one, bases_of, randomise
from tests.support.products import in_one_item

every_basis = in_one_item("basis", ["uniform", "ternary", "hadamard"])
HALF = torch.bfloat16


class Three(nn.Module):
    """Layers with two layouts: 5 x 12 and 5 x 14 columns (13 and 14 bases in one, as 66 is not a multiple of 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(66, 66), nn.Linear(66, 140), nn.Linear(140, 60)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.third(self.second(self.first(x)).relu())
        return out


def three(basis: Any = "uniform", **options: Any) -> Three:
    torch.manual_seed(0)
    model = Three()
    inject(model, RandLoRA(rank=5, basis=basis, **options), [".*"])
    randomise(model, 0.3)
    return model


def step(model: nn.Module, tokens: int = 200, features: int = 66) -> list[Tensor]:
    """Outputs and gradients of a training step under autocast."""
    torch.manual_seed(1)
    x = torch.randn(tokens, features, requires_grad=True)
    with torch.autocast("cpu", HALF):
        output = model(x)
    return [output, *torch.autograd.grad(output.float().square().sum(), [x, *trainable_parameters(model).values()])]


def prepare(model: Three) -> None:
    for layer in model.children():
        layer.delta.prepare(HALF)  # type: ignore[union-attr, operator]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@every_basis
def test_each_copy_is_made_once(basis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = three(basis)
    (shared,) = bases_of(model)
    prepare(model)
    made = dict(shared.copies._made)
    first = step(model)
    assert shared.copies._made.keys() == made.keys()
    assert 0 < len(made) == len(shared.copies) < 13
    assert equal(step(model), first)
    assert all(shared.copies._made[key] is tensor for key, tensor in made.items())
    assert not any("copies" in name for name in model.state_dict())
    plain = three(basis)
    plain(torch.randn(200, 66)).sum().backward()  # float32 needs none
    assert basis != "uniform" or len(bases_of(plain)[0].copies) == 0


@every_basis
def test_copies_go_with_the_bits_and_stay_out_of_copies_of_the_model(basis: str) -> None:
    model = three(basis)
    (shared,) = bases_of(model)
    expected = step(model)
    twin = copy.deepcopy(model)
    (other,) = bases_of(twin)
    assert len(other.copies) == 0
    assert equal(step(twin), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert all(len(each.copies) == 0 for each in bases_of(again))
    assert equal(step(again), expected)
    model.to("cpu")
    assert len(shared.copies) == 0
    step(model)
    with torch.no_grad():
        shared.B[:, 0].neg_()  # in place
    changed = step(model)
    assert not equal(changed, expected)
    shared.B = shared.B.clone()  # another tensor
    shared.B[:, 0].neg_()
    assert equal(step(model), expected)


def faked(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of a model in which all tensors are fake."""
    result = copy.deepcopy(model)
    for module in result.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: mode.from_tensor(each) for name, each in held.items() if each is not None})  # type: ignore[arg-type]
    return result


@every_basis
def test_no_tracer_leaves_its_tensors_behind(basis: str) -> None:
    model = three(basis)
    (shared,) = bases_of(model)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", HALF):
        model(torch.randn(200, 66))
    assert len(shared.copies) == 0
    step(model)
    kept = list(shared.copies._made.values())
    assert kept
    assert all(type(tensor) is Tensor for tensor in kept)
    fake = faked(model, mode := FakeTensorMode())
    with mode:
        step(fake)
        (shared,) = bases_of(fake)
        kept = list(shared.copies._made.values())
        step(fake)
        assert kept
        assert all(map(lambda one, two: one is two, kept, shared.copies._made.values()))  # a trace counts as a run does
        assert all(isinstance(tensor, FakeTensor) for tensor in kept)
    model = three(basis)
    (shared,) = bases_of(model)
    with torch.inference_mode(), torch.autocast("cpu", HALF):
        model(torch.randn(200, 66))
    assert len(shared.copies)
    assert not any(tensor.is_inference() for tensor in shared.copies._made.values())
    step(model)
    meta = three(basis).to("meta")
    with torch.autocast("cpu", HALF):
        assert meta(torch.randn(200, 66, device="meta")).is_meta


class Padded(Stored):
    """As on a GPU: rows of a multiple of 64 entries, a multiple of 8 columns."""

    def _padded(self, dtype: torch.dtype) -> bool:
        return True


@in_one_item("dropout", [0.0, 0.5])
@in_one_item(("basis", "rank", "sizes"), [
    ("uniform", 3, (31, 31)), ("uniform", 5, (66, 140)), ("uniform", 5, (140, 66)), ("ternary", 3, (31, 95)),
    ("ternary", 7, (101, 37)), ("binary", 1, (33, 65)), ("uniform", 30, (411, 411)),
])  # fmt: skip
def test_padding_changes_no_bit(
    basis: Any, rank: int, sizes: tuple[int, int], dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd n r, as 4,110 in Llama; few and many tokens, so that every form of the product is taken.

    A CPU groups the terms of a float32 sum by their number: float32 is tested on integers, whose sums are exact.
    """
    model, _ = adapted_one(RandLoRA(rank=rank, alpha=float(rank), basis=basis, dropout=dropout), *sizes)
    (shared,) = bases_of(model)
    shared.scale = 1.0
    randomise(model, 0.3)
    for tokens, autocast in ((3, True), (700, True), (3, False), (700, False)):
        if not autocast:
            with torch.no_grad():
                for value in (shared.A, shared.B, *model.parameters()):
                    value.copy_(torch.randint(-1, 2, value.shape))
                model.fc.delta.lambdas.mul_(0.5)  # type: ignore[union-attr, operator]
        results = []
        for kind in (Stored, Padded):
            monkeypatch.setattr("randlora_pl.adapters.methods.randlora.Stored", kind)
            shared.copies.clear()
            results.append(step(model, tokens, sizes[0]) if autocast else whole_step(model, tokens, sizes[0]))
        assert equal(*results)


def whole_step(model: nn.Module, tokens: int, features: int) -> list[Tensor]:
    """Outputs and gradients of a step on integers."""
    torch.manual_seed(1)
    x = torch.randint(-1, 2, (tokens, features)).float().requires_grad_()
    output = model(x)
    upper = torch.randint(-1, 2, output.shape).float()
    return [output, *torch.autograd.grad((output * upper).sum(), [x, *trainable_parameters(model).values()])]


@pytest.mark.slow
@every_basis
def test_a_compiled_layer_reads_the_copies_of_an_earlier_call(basis: str) -> None:
    expected = step(three(basis))
    model = three(basis)
    prepare(model)
    (shared,) = bases_of(model)
    kept = dict(shared.copies._made)
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert equal(step(compiled), expected)
    assert dict(shared.copies._made) == kept
    assert not any("cos" in name for name in names)
