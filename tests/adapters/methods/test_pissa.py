"""PiSSA, its relatives and LoRA-XS: the start, the rank, the equation, and PEFT's layer as a judge."""

import pytest
import torch
from torch import nn

from randlora_pl.adapters import LoRAXS, PiSSA, adapted_layers, delta_weights, inject, trainable_parameters
from randlora_pl.adapters.methods.singular import LoRAXSDelta, PiSSADelta
from randlora_pl.adapters.random_bases import WeightShape
from tests.adapters.cases import assert_close, randomise
from tests.support.products import in_one_item


def layer(out_features: int = 20, in_features: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(in_features, out_features))


def update_of(model: nn.Module) -> PiSSADelta:
    return adapted_layers(model)["0"].delta  # type: ignore[return-value]


@in_one_item(("alpha", "start"), [(None, "pissa"), (8.0, "pissa"), (None, "olora"), (2.0, "olora")])
def test_equations(alpha: float | None, start: str) -> None:
    model, rank = layer(), 4
    weight = model[0].weight.detach().double().clone()
    inject(model, PiSSA(rank=rank, alpha=alpha, start=start), ["0"])  # type: ignore[arg-type]
    delta = update_of(model)
    scaling = 1.0 if alpha is None else alpha / rank
    b0, a0 = (delta.get_buffer(name).double() for name in ("B0", "A0"))
    assert delta.scaling == scaling and not delta.change(torch.empty(0)).any()
    if start == "pissa":
        values = torch.linalg.svdvals(weight)
        rest = (weight - scaling * b0 @ a0).square().sum()
        torch.testing.assert_close(rest, values[rank:].square().sum(), rtol=1e-5, atol=0)
    else:
        torch.testing.assert_close(b0.T @ b0, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-6)
        torch.testing.assert_close((b0 @ a0)[:, :rank], weight[:, :rank], rtol=0, atol=1e-5)
    randomise(model)
    change = delta_weights(model)["0"]
    expected = scaling * (delta.B.double() @ delta.A.double() - b0 @ a0)
    assert_close(change.double(), expected)
    assert int(torch.linalg.matrix_rank(change.double(), rtol=1e-5)) == 2 * rank


def test_minor_components() -> None:
    model = layer()
    weight = model[0].weight.detach().double()
    assert inject(model, PiSSA(rank=4, start="minor"), ["0"]).trainable == 4 * 12
    assert list(trainable_parameters(model)) == ["0.delta.A"]
    randomise(model)
    u = torch.linalg.svd(weight, full_matrices=False)[0]
    change = delta_weights(model)["0"].double()
    assert_close(u[:, -4:] @ (u[:, -4:].T @ change), change)


def test_every_rank_up_to_the_smaller_side_and_counts_without_a_decomposition() -> None:
    model = layer()
    inject(model, PiSSA(rank=12), ["0"])
    delta = update_of(model)
    torch.testing.assert_close(delta.get_buffer("B0") @ delta.get_buffer("A0"), model[0].weight.detach())
    with torch.device("meta"):
        sides = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
        block = nn.Sequential(*(nn.Linear(*each, bias=False) for each in sides))
    assert 32 * inject(block, PiSSA(rank=128)).trainable == 319_815_680  # Llama-2-7B


@in_one_item(("start", "alpha"), [("pissa", 4), ("pissa", 16), ("olora", 4), ("olora", 16)])
def test_peft_has_the_same_layer(start: str, alpha: int) -> None:
    peft = pytest.importorskip("peft")
    model, plain = layer(), layer()
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["0"], init_lora_weights=start)
    theirs = peft.get_peft_model(plain, config)
    inject(model, PiSSA(rank=4, alpha=float(alpha), start=start), ["0"])  # type: ignore[arg-type]
    x, delta, other = torch.randn(5, 12), update_of(model), theirs.base_model.model[0]
    assert_close(theirs(x), model(x))
    assert_close(other.lora_B["default"].weight @ other.lora_A["default"].weight, delta.B @ delta.A)
    randomise(model)
    with torch.no_grad():
        other.lora_A["default"].weight.copy_(delta.A)
        other.lora_B["default"].weight.copy_(delta.B)
    assert_close(theirs(x), model(x))


# LoRA-XS: the equation, the spans, and counts of the paper


def adapted(adapter: LoRAXS) -> tuple[nn.Sequential, LoRAXSDelta]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20))
    inject(model, adapter, ["0"])
    delta = adapted_layers(model)["0"].delta
    return model, delta


@in_one_item(("alpha", "balance"), [(None, "right"), (16.0, "right"), (16.0, "both")])
def test_equation(alpha: float | None, balance: str) -> None:
    rank = 4
    model, delta = adapted(LoRAXS(rank=rank, alpha=alpha, balance=balance))  # type: ignore[arg-type]
    u, s, v = (part.double() for part in torch.linalg.svd(model[0].weight.detach().double(), full_matrices=False))
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    assert not delta.change(torch.empty(0)).any()
    randomise(model)
    change = delta_weights(model)["0"].double()
    signs = torch.sign((u * delta.get_buffer("U").double()).sum(0))
    inner = signs[:, None] * (u.T @ change @ v.T / s) * signs  # of the vectors with our signs
    ours = (1.0 if alpha is None else alpha / rank) * delta.R.detach().double()
    assert_close(inner, ours if balance == "right" else s.sqrt()[:, None] * ours / s.sqrt())
    assert_close(u @ u.T @ change @ v.T @ v, change)  # no other directions
    assert int(torch.linalg.matrix_rank(change, rtol=1e-5)) == rank


def test_counts_of_the_paper_the_official_start_and_budgets() -> None:
    """Query, value, attention output and output of RoBERTa-large."""
    shapes = [*[WeightShape("query", 1024, 1024)] * 3, WeightShape("output", 1024, 4096)]
    for rank, count in {4: 1_536, 8: 6_144, 12: 13_824, 16: 24_576, 20: 38_400, 25: 60_000}.items():
        assert 24 * sum(LoRAXS(rank=rank).count(shape) for shape in shapes) == count
    _, delta = adapted(LoRAXS(rank=12, init="official", seed=3))
    again = adapted(LoRAXS(rank=12, init="official", seed=3))[1]
    assert torch.equal(delta.R, again.R) and 0.8e-5 < float(delta.R.detach().std()) < 1.2e-5
    assert inject(nn.Sequential(nn.Linear(12, 20)), LoRAXS(match="lora:1"), ["0"]).trainable == 36
