"""A report counts weights as well as layers, and warns where most stay frozen."""

import pytest
import timm
import torch
from torch import nn

from randlora_pl.adapters import LoRA, inject
from randlora_pl.adapters.sites import is_router


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 8, 16))
        self.bias = nn.Parameter(torch.zeros(4, 16))


class Block(nn.Module):
    """A mixture: a router, stacked experts, and one linear layer beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.gate = nn.Linear(8, 4)
        self.experts = Experts()
        self.dense = nn.Linear(8, 8, bias=False)


def mixture() -> nn.Module:
    return nn.Sequential(Block(), Block())


def test_stacked_experts_are_counted_and_the_router_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    report = inject(mixture(), LoRA(rank=2))
    assert [row.layer for row in report.rows] == ["0.dense", "1.dense"]
    weights = {"dense": 8 * 8, "gate": 8 * 4, "up": 4 * 8 * 16}  # of a block, counted by hand
    assert report.coverage.share == pytest.approx(weights["dense"] / sum(weights.values()))
    assert report.coverage.frozen == {"*.experts.up": 2 * 512, "*.gate.weight": 2 * 32}
    assert report.coverage.line == (
        "2 of 4 linear layers, 10.5 % of the weights of the blocks; skipped: 2 x *.gate (router)"
    )
    warning = report.coverage.warning
    assert warning.startswith("only 10.5 % of the weights of the blocks are adapted. Frozen: *.experts.up (84.2 %), ")
    assert "stacked experts, cannot be adapted" in warning and "[all" not in warning
    assert warning in str(report) and [record.message for record in caplog.records] == [f"Sequential: {warning}"]


def test_a_choice_of_the_user_is_not_warned_of() -> None:
    assert inject(mixture(), LoRA(rank=2), ["dense"]).coverage.warning == ""
    report = inject(mixture(), LoRA(rank=2), ["all"])
    assert report.coverage.warning and {row.layer for row in report.rows} == {"0.dense", "1.dense"}
    named = inject(mixture(), LoRA(rank=2), ["[01].gate", "dense"])
    assert {row.layer for row in named.rows} >= {"0.gate", "1.gate"}
    assert inject(mixture(), LoRA(rank=2), trained=["experts"]).coverage.share == pytest.approx(1 - 32 / 608)


def test_gates_that_are_no_routers() -> None:
    with torch.device("meta"):
        model = timm.create_model("gmlp_s16_224", num_classes=0)
    assert not any(is_router(model, path) for path, _ in model.named_modules())


def test_qwens_mixture_at_tiny_size_warns(caplog: pytest.LogCaptureFixture) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install '.[language]'")
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.Qwen3MoeConfig(**sizes, **heads, num_experts=8, num_experts_per_tok=2, vocab_size=32)
    report = inject(transformers.Qwen3MoeForCausalLM(config), LoRA(rank=2))
    attention, experts, router = 4 * 16 * 16, 8 * (16 * 16 + 16 * 8), 8 * 16
    assert report.coverage.share == pytest.approx(attention / (attention + experts + router))
    assert not any("gate" in row.layer for row in report.rows)
    assert "mlp.experts.gate_up_proj (48.5 %)" in report.coverage.warning and len(caplog.records) == 1


def test_convolutions_beside_linear_layers_are_weighed(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        model = timm.create_model("fastvit_mci2", num_classes=0)
    report = inject(model, LoRA(rank=2))
    assert report.coverage.line.startswith("8 of 8 linear layers, 0 of 235 convolutions (`conv`: 227), 18.9 % of the")
    assert "--model.targets '[all, conv]'" in report.coverage.warning
    assert not caplog.records  # a model without values is only counted
    with torch.device("meta"):
        model = timm.create_model("fastvit_mci2", num_classes=0)
    assert inject(model, LoRA(rank=2), ["all", "conv"]).coverage.share > 0.9


def test_layers_of_other_shapes_have_other_names_in_the_table() -> None:
    with torch.device("meta"):
        report = inject(timm.create_model("pvt_v2_b0"), LoRA(rank=2))
    names = [name for name, *_ in report.grouped()]
    assert names[:2] == ["stages.0.blocks.*.attn.q", "stages.0.blocks.*.attn.kv"] and len(set(names)) == len(names)


def test_layers_of_the_default_below_the_rank_are_left_out_with_a_reason() -> None:
    with torch.device("meta"):
        model = timm.create_model("csatv2", num_classes=0)
    report = inject(model, LoRA(rank=32))
    assert "14 x stages.*.*.attn.attn.qkv (rank above 1)" in report.coverage.line and report.coverage.warning
