"""LoRA-XS: the equation, the spans, counts of the paper, and the choice of the cheaper product."""

import pytest
import torch
from torch import nn

from randlora_pl.adapters import LoRAXS, adapted_layers, delta_weights, inject
from randlora_pl.adapters.methods.loraxs import LoRAXSDelta
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.models import meta_clip
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import assert_close, randomise
from tests.support.products import in_one_item


def adapted(adapter: LoRAXS) -> tuple[nn.Sequential, LoRAXSDelta]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20))
    inject(model, adapter, ["0"])
    delta = adapted_layers(model)["0"].delta
    assert isinstance(delta, LoRAXSDelta)
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


def test_counts_of_the_paper() -> None:
    """Query, value, attention output and output of RoBERTa-large, and both towers of CLIP."""
    with torch.device("meta"):
        block = nn.ModuleDict({name: nn.Linear(1024, 1024) for name in ("query", "value", "attention_output")})
        block["output"] = nn.Linear(4096, 1024)
    counts = {4: 1_536, 8: 6_144, 12: 13_824, 16: 24_576, 20: 38_400, 25: 60_000}
    for rank, count in counts.items():
        adapter = LoRAXS(rank=rank)
        assert 24 * sum(adapter.count(shape_of(name, layer)) for name, layer in block.items()) == count
    assert inject(meta_clip("ViT-B-32"), LoRAXS(rank=64)).trainable == 294_912
    assert inject(meta_clip("ViT-B-32"), LoRAXS(rank=256)).trainable == 4_718_592


def shape_of(name: str, layer: nn.Module) -> WeightShape:
    assert isinstance(layer, nn.Linear)
    return WeightShape(name, layer.out_features, layer.in_features)


def test_options() -> None:
    with pytest.raises(UserError, match="LoRAXS: rank 13 is larger than the smaller side 12 of 0"):
        adapted(LoRAXS(rank=13))
    with pytest.raises(UserError, match=r"balance is 'left'. Set right or both"):
        LoRAXS(balance="left")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"init is 'zeros'. Did you mean 'zero'\? Set zero or official"):
        LoRAXS(init="zeros")  # type: ignore[arg-type]
    _, delta = adapted(LoRAXS(rank=12, init="official", seed=3))
    again = adapted(LoRAXS(rank=12, init="official", seed=3))[1]
    assert torch.equal(delta.R, again.R) and 0.8e-5 < float(delta.R.detach().std()) < 1.2e-5
    assert inject(nn.Sequential(nn.Linear(12, 20)), LoRAXS(match="lora:1"), ["0"]).trainable == 36


def test_products_agree_at_every_number_of_tokens() -> None:
    model, delta = adapted(LoRAXS(rank=12))  # three products for few tokens, one with the built weight for many
    randomise(model)
    for tokens in (1, 7, 500):
        x = torch.randn(2, tokens, 12)
        expected = x @ (model[0].weight + delta.change(torch.empty(0))).T + model[0].bias
        assert_close(model(x), expected)
        (gradient,) = torch.autograd.grad(model(x).square().sum(), delta.R)
        (slow,) = torch.autograd.grad(expected.square().sum(), delta.R)
        assert_close(gradient, slow, 1e-4)
