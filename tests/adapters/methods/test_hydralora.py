"""HydraLoRA: heads, router and dropout; its formula is tested by the contract, refusals by test_input_dependent."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from randlora_pl.adapters import HydraLoRA, LoRA, inject
from randlora_pl.adapters.methods.lora import HydraLoRADelta
from randlora_pl.adapters.random_bases import WeightShape
from tests.adapters.cases import One, adapted_one, assert_close, randomise
from tests.adapters.reference import hydralora
from tests.support.products import in_one_item


def adapted(in_features: int = 12, out_features: int = 20, **options: Any) -> tuple[One, HydraLoRADelta]:
    """Return a layer with an update whose tensors are random."""
    model, delta = adapted_one(HydraLoRA(**{"rank": 4, "alpha": 6.0, **options}), in_features, out_features)
    randomise(model)
    return model, delta


def test_a_starts_as_lora_s_and_counts() -> None:
    deltas = [adapted_one(each)[1] for each in (HydraLoRA(rank=4, seed=3), LoRA(rank=4, seed=3))]
    assert torch.equal(deltas[0].A, deltas[1].A)
    layers = 64 * HydraLoRA().count(WeightShape("q_proj", 4096, 4096))
    assert layers == 9_175_040  # q and v of Llama-2-7B; the paper leaves out the 786,432 of the routers
    assert HydraLoRA(rank=4, heads=2).count(WeightShape("fc", 20, 12)) == 4 * 12 + 2 * 4 * 20 + 2 * 12


def test_heads_share_one_dropout_mask_and_one_product_and_the_router_sees_the_whole_input() -> None:
    """The released code drops out anew and multiplies with A again for every head."""
    model, delta = adapted(16, 3, rank=3, heads=3, dropout=0.5)
    x = torch.randn(50, 16)
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.zero_()
        delta.B.copy_(torch.eye(3)[:, :, None].expand(3, 3, 3))  # head k writes output k alone
        outputs = model(x)
    gates = (x @ delta.router.T).softmax(-1)
    hidden = outputs / gates
    assert_close(hidden, hidden[:, :1].expand(50, 3), 1e-4)  # one mask, and gates of the input before dropout
    whole = 2 * (x @ delta.A.T).sum(-1, keepdim=True)
    assert (hidden[:, :1] - whole).abs().median() > 0.1
    with FlopCounterMode(display=False) as counter:
        delta.contribution(x, lambda: x)
    assert counter.get_total_flops() == 2 * 50 * (3 * 16 + 3 * 16 + 3 * 3 * 3)  # r in + K in + K r out for each token


def test_gates_are_float32_with_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted()
    seen: list[Tensor] = []
    gates = HydraLoRADelta.gates
    monkeypatch.setattr(HydraLoRADelta, "gates", lambda *a: seen.append(gates(*a)) or seen[-1])  # type: ignore[func-returns-value]
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(5, 12)).dtype == torch.bfloat16
    assert model.bfloat16()(torch.randn(5, 12).bfloat16()).dtype == torch.bfloat16
    assert [each.dtype for each in seen] == [torch.float32, torch.float32]
    assert all(torch.allclose(each.sum(-1), torch.ones(5)) for each in seen)


@in_one_item("groups", [1, 2])
def test_a_convolution_is_the_layer_on_every_patch(groups: int) -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups, padding_mode="reflect")
    plain = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups, padding_mode="reflect")
    plain.load_state_dict(conv.state_dict())
    model = nn.Sequential(conv)
    inject(model, HydraLoRA(rank=3, heads=2, alpha=3.0), ["0"])
    randomise(model)
    x = torch.randn(2, 4, 7, 5)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    patches = F.unfold(padded, 3, stride=2).unflatten(1, (groups, -1)).movedim(-1, 1)  # (2, positions, groups, in)
    delta: Any = conv.delta
    a, heads, router = (tensor.detach().double().tolist() for tensor in (delta.A, delta.B, delta.router))
    expected = plain(x).double()
    rows = 6 // groups
    for image, places in enumerate(patches.double().tolist()):
        for place, inputs in enumerate(places):
            for group, patch in enumerate(inputs):
                own = slice(group * rows, (group + 1) * rows)
                found = torch.tensor(hydralora(patch, a, heads, router, delta.scaling)[own])
                expected[image, own, place // 3, place % 3] += found.double()
    assert_close(model(x).double(), expected, 1e-5)
    assert_close(model(x[0]), model(x)[0], 1e-6)


def test_balance_is_the_squared_coefficient_of_variation_of_the_mean_gates() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    procedure = inject(model, HydraLoRA(rank=4, heads=3, balance=0.5), [".*"]).procedure
    assert procedure is not None
    deltas: list[Any] = [layer.delta for layer in model]
    with torch.no_grad():
        deltas[0].router.mul_(9)
    x = torch.randn(4, 5, 12)
    assert procedure.penalty() is None
    model.eval()(x)
    assert procedure.penalty() is None  # evaluation has no loss
    hidden = model.train()[0](x)
    model(x)
    means = [(x @ deltas[0].router.T).softmax(-1).mean((0, 1)), (hidden @ deltas[1].router.T).softmax(-1).mean((0, 1))]
    terms = [float((each.var(correction=0) / each.mean() ** 2).detach()) for each in means]
    penalty = procedure.penalty()
    assert penalty is not None and penalty.item() == pytest.approx(0.5 * sum(terms) / 2, rel=1e-4)
    penalty.backward()
    assert all(delta.router.grad.any() for delta in deltas)
    procedure.after_step(0, 2)
    model(x)
    procedure.after_step(1, 2)
    assert copy.deepcopy(model)(x).shape == x.shape  # no tensor with a history is left
    model(x[0, 0])
    one = procedure.penalty()  # of one token, without other dimensions
    assert one is not None and one.isfinite()
    assert inject(One(12, 20), HydraLoRA(rank=4), ["fc"]).procedure is None
