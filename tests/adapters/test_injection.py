"""Injection: the paper's parameter counts, the report, and a model that stays as it was when anything is wrong."""

import copy
import itertools
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from randlora_pl.adapters import (
    OFT,
    SVFT,
    AdaLoRA,
    Adapter,
    BitFit,
    DoRA,
    FullFineTuning,
    KRAdapter,
    LinearProbe,
    LoRA,
    LoRAXS,
    NoLA,
    RandLoRA,
    SHiRA,
    VeRA,
    adapted_layers,
    delta_weights,
    inject,
    merge_and_unload,
    trainable_parameters,
)
from randlora_pl.adapters.trained import hash_weights
from randlora_pl.utils.errors import UserError
from tests.adapters import zoo
from tests.adapters.cases import METHODS, One, SelfAttention, assert_close, randomise
from tests.support.products import in_one_item, marked

FLOOR = {"num_bases": "floor+1"}
VISUAL = ["visual:qkv", "visual:mlp"]
DINOV2 = "vit_base_patch14_dinov2"
# Tables 11, 12, 13 and 14 of the paper as far as they say, else computed from its formulas; each is both
# the sum of the formulas and the number of elements that exist.
COUNTS: list[tuple[str, Adapter, list[str] | None, int]] = [
    ("ViT-B-32", RandLoRA(rank=6), None, 5_170_320),
    ("ViT-B-32", RandLoRA(rank=6, **FLOOR), None, 5_198_184),  # type: ignore[arg-type]
    ("ViT-B-32", RandLoRA(rank=10, **FLOOR), None, 3_133_800),  # type: ignore[arg-type]
    ("ViT-B-32", RandLoRA(rank=3, variant="b"), None, 5_147_208),
    ("ViT-B-32", RandLoRA(rank=6), VISUAL, 3_566_592),
    ("ViT-B-32", RandLoRA(rank=6, **FLOOR), VISUAL, 3_594_456),  # type: ignore[arg-type]
    ("ViT-B-32", LoRA(rank=32), None, 6_881_280),
    ("ViT-B-32", LoRA(rank=16), None, 3_440_640),
    ("ViT-B-32", VeRA(rank=256), None, 141_312),
    ("ViT-B-32", VeRA(rank=1024), None, 196_608),
    ("ViT-B-32", NoLA(rank=1, num_bases=1024), None, 147_456),
    ("ViT-B-32", KRAdapter(), None, 5_630_976),
    ("ViT-B-32", SHiRA(rank=32), None, 6_881_280),
    ("ViT-B-32", AdaLoRA(), None, 10_325_376),
    ("ViT-B-32", LoRAXS(rank=64), None, 294_912),
    ("ViT-B-32", OFT(block=32), None, 1_428_480),
    ("ViT-B-32", SVFT(pattern="plain"), None, 46_080),
    ("ViT-B-32", SVFT(pattern="random", off_diagonals=8), None, 778_176),
    ("ViT-B-32", DoRA(LoRA(rank=32)), None, 6_881_280 + 12 * (2304 + 3072 + 768) + 12 * (1536 + 2048 + 512)),
    ("ViT-B-32", FullFineTuning(), None, 151_277_313),
    ("ViT-L-14", RandLoRA(rank=8), None, 12_192_768),
    ("ViT-L-14", RandLoRA(rank=8), VISUAL, 9_510_912),
    ("ViT-L-14", RandLoRA(rank=10), None, 9_824_760),
    ("ViT-L-14", LoRA(rank=32), None, 15_138_816),
    ("ViT-L-14", VeRA(rank=256), None, 297_984),
    ("ViT-H-14", RandLoRA(rank=10), None, 23_519_664),
    ("ViT-H-14", LoRA(rank=32), None, 29_360_128),
    ("ViT-H-14", NoLA(rank=1, num_bases=1024), None, 344_064),
    (DINOV2, RandLoRA(rank=6), None, 3_566_592),
    (DINOV2, RandLoRA(rank=8, **FLOOR), None, 2_709_792),  # type: ignore[arg-type]
    (DINOV2, LoRA(rank=32), None, 4_128_768),
    (DINOV2, VeRA(rank=256), None, 82_944),
]


@pytest.fixture(scope="module")
def on_meta() -> dict[str, nn.Module]:
    models: dict[str, nn.Module] = {name: zoo.clip_on_meta(name) for name in ("ViT-B-32", "ViT-L-14", "ViT-H-14")}
    return models | {DINOV2: zoo.timm_on_meta(DINOV2)}


@pytest.mark.parametrize(
    ("name", "adapter", "targets", "expected"), marked(COUNTS, lambda row: COUNTS.index(row) % 4 == 0)
)
def test_parameter_counts_of_the_paper(
    on_meta: dict[str, nn.Module], name: str, adapter: Adapter, targets: list[str] | None, expected: int
) -> None:
    model = on_meta[name]
    report = inject(model, adapter, targets)
    try:
        assert report.trainable == expected == sum(row.trainable for row in report.rows)
        assert all(value.is_meta for value in model.state_dict().values())
        assert (report.fingerprint, report.base_hash) == ("", "")
    finally:
        merge_and_unload(model)
        model.requires_grad_(True)


def test_the_report_is_a_table_of_the_adapted_layers(on_meta: dict[str, nn.Module]) -> None:
    model = on_meta["ViT-B-32"]
    report = inject(model, RandLoRA(rank=6))
    lines = str(report).splitlines()
    merge_and_unload(model)
    model.requires_grad_(True)
    assert lines[-1] == report.coverage.line and lines[-1].startswith("72 of 96 linear layers (the paper's choice")
    assert [line.split() for line in lines[:-1]] == [
        ["layer", "kind", "out", "x", "in", "layers", "trainable"],
        ["visual.transformer.resblocks.*.attn.in_proj", "qkv", "2304", "x", "768", "12", "1,188,864"],
        ["visual.transformer.resblocks.*.mlp.c_fc", "linear", "3072", "x", "768", "12", "1,188,864"],
        ["visual.transformer.resblocks.*.mlp.c_proj", "linear", "768", "x", "3072", "12", "1,188,864"],
        ["transformer.resblocks.*.attn.in_proj", "qkv", "1536", "x", "512", "12", "534,576"],
        ["transformer.resblocks.*.mlp.c_fc", "linear", "2048", "x", "512", "12", "534,576"],
        ["transformer.resblocks.*.mlp.c_proj", "linear", "512", "x", "2048", "12", "534,576"],
        ["RandLoRA:", "5,170,320", "of", "156,447,633", "parameters", "train", "(3.30", "%)"],
    ]
    assert len({len(line) for line in lines[:-2]}) == 1  # columns line up
    assert report.total == 151_277_313 + report.trainable


def test_a_plain_mlp_and_a_bare_layer_are_adapted() -> None:
    for plain, x in ((zoo.mlp(), torch.randn(2, 8)), (nn.Linear(3, 4), torch.randn(2, 3))):
        model = copy.deepcopy(plain)
        report = inject(model, RandLoRA(rank=2))
        randomise(model)
        assert {row.layer for row in report.rows} == set(delta_weights(model))
        assert (model(x) - plain(x)).abs().max() > 1e-3
        expected = model(x)
        assert_close(merge_and_unload(model)(x), expected)
        assert type(model) is type(plain)


def test_a_long_preparation_tells_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("randlora_pl.adapters.injection.time.monotonic", itertools.count(0, 11).__next__)
    with caplog.at_level("INFO", "randlora_pl"):
        inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoRA(rank=1), [".*"])
    assert "LoRA: 1 of 2 weights are prepared" in caplog.text


def test_methods_draw_nothing_from_the_global_generator() -> None:
    model = zoo.small_clip(layers=1).visual
    before = torch.get_rng_state()
    for make in METHODS.values():
        inject(copy.deepcopy(model), make(2, "packed"))
    assert torch.equal(torch.get_rng_state(), before)


# Nothing happens to a model when something is wrong


class Late(LoRA):
    """Fails at the third layer, when two updates are made already."""

    made: ClassVar[list[int]] = []

    def delta_weight(self, *args: Any) -> Any:
        self.made.append(1)
        if len(self.made) % 3 == 0:
            raise UserError("the third layer is impossible")
        return super().delta_weight(*args)


FAILING: dict[str, tuple[Adapter, list[str] | None, str]] = {
    "no such target": (LoRA(rank=2), ["qkv", "nothing"], "matches no layer"),
    "one layer too small": (LoRA(rank={"fc1": 30, ".*": 2}), ["all"], "rank 30 is larger than the smaller side 24"),
    "unknown budget": (RandLoRA(match="best:1"), None, "match is 'best:1'"),
    "late": (Late(rank=2), None, "the third layer"),
    "rank pattern": (LoRA(rank={"fc3": 2}), None, "LoRA: rank pattern 'fc3' matches none of the 6 adapted layers"),
    "alpha pattern": (
        DoRA(LoRA(rank=2, alpha={r".*\.proj": 2.0})),
        None,
        r"alpha pattern '\.\*\\\\\.proj' matches none",
    ),
    "no expression": (LoRA(rank={"(": 2}), None, r"rank pattern '\(' is not a regular expression"),
    "targets of BitFit": (BitFit(), ["qkv"], "Remove the targets"),
}


@in_one_item("case", FAILING)
def test_a_failed_injection_leaves_the_model_as_it_was(case: str) -> None:
    adapter, targets, message = FAILING[case]
    model = zoo.small_vit()
    model.blocks[0].requires_grad_(False)  # type: ignore[index,union-attr]
    before = [(type(m), sorted(vars(m)), m.training) for m in model.modules()]
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        inject(model, adapter, targets)
    assert [(type(m), sorted(vars(m)), m.training) for m in model.modules()] == before
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    inject(model, LoRA(rank=2))


@in_one_item("adapter", [LoRA(rank=2), RandLoRA(rank=2), BitFit()])
def test_a_second_adapter_is_refused_also_through_a_part(adapter: Adapter) -> None:
    model = zoo.small_clip()
    inject(model, LoRA(rank=2), ["visual:qkv"])
    trains = set(trainable_parameters(model))
    for again in (model, model.visual):
        with pytest.raises(UserError, match="merge_and_unload"):
            inject(again, adapter)
    part = zoo.small_clip()
    inject(part.visual, LoRA(rank=2))
    with pytest.raises(UserError, match="already has adapters"):
        inject(part, adapter)
    assert set(trainable_parameters(model)) == trains
    merge_and_unload(part)
    inject(part, adapter)


@in_one_item("wrong", ["RandLoRA", RandLoRA, nn.Sequential(nn.Linear(2, 2))])
def test_anything_but_a_method_is_refused_in_one_line(wrong: Any) -> None:
    with pytest.raises(UserError, match=r"needs a method .*\.\Z"):
        inject(zoo.small_vit(), wrong)


# Identity of the base


def test_the_hash_tells_weights_names_and_shapes_apart() -> None:
    model = SelfAttention(12)
    known = hash_weights(model)
    assert known == hash_weights(copy.deepcopy(model)) == inject(copy.deepcopy(model), LoRA(rank=2)).base_hash
    seen = {known}
    for change in ("value", "name", "shape"):
        other = copy.deepcopy(model)
        if change == "value":
            other.attn.in_proj_weight.data[3, 4] += 1
        elif change == "name":
            other.also = other.attn
            del other.attn
        else:
            other.attn.in_proj_bias = nn.Parameter(other.attn.in_proj_bias.view(6, 6))
        seen.add(hash_weights(other))
    assert len(seen) == 4
    assert hash_weights(model.to("meta")) == ""


def test_the_hash_sees_values_at_even_steps_and_no_precision() -> None:
    model = SelfAttention(12).bfloat16()
    assert hash_weights(model) == hash_weights(copy.deepcopy(model).float()) == hash_weights(model.double())
    model = nn.Linear(3000, 50)
    known = hash_weights(model)
    with torch.no_grad():
        model.weight += 0.5
    assert hash_weights(model) != known


def test_reports_of_routing_attention_of_a_probe_and_of_a_text_as_target() -> None:
    model = SelfAttention(12)
    report = inject(model, LoRA(rank=2), ["o"])
    assert [row.layer for row in report.rows] == ["attn.out_proj"]
    assert list(adapted_layers(model)) == ["attn", "attn.out_proj"]
    assert list(delta_weights(model)) == ["attn.out_proj"]
    report = inject(One(3, 4), LinearProbe())
    assert "LinearProbe: 0 of 16 parameters train (0.00 %)" in str(report).splitlines()
    assert report.rows == []
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    report = inject(model, RandLoRA(rank=2), "0", "1")
    assert [row.layer for row in report.rows] == ["0"] and report.targets == ["0"] and report.trained == ["1"]
