"""Injection: the paper's parameter counts, the report, and a model that stays as it was when anything is wrong."""

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import (
    PRANC,
    SVFT,
    Adapter,
    AutoLoRA,
    BitFit,
    DoRA,
    FullFineTuning,
    KRAdapter,
    LinearProbe,
    LoRA,
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
from randlora_pl.adapters.save_load import read_adapter, save_adapter
from randlora_pl.adapters.trained import hash_weights
from randlora_pl.utils.errors import UserError
from tests.adapters import zoo
from tests.adapters.cases import One, SelfAttention, assert_close, randomise
from tests.support.products import covered, in_one_item, marked

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
    ("ViT-B-32", PRANC(coefficients=10_000), None, 720_000),
    ("ViT-B-32", AutoLoRA(rank=32), None, 6_881_280),
    ("ViT-B-32", AutoLoRA(rank=6, select="bases"), None, 5_170_320),
    ("ViT-B-32", KRAdapter(), None, 5_630_976),
    ("ViT-B-32", SHiRA(rank=32), None, 6_881_280),
    ("ViT-B-32", SVFT(pattern="plain"), None, 46_080),
    ("ViT-B-32", SVFT(pattern="banded", off_diagonals=2), None, 229_968),
    ("ViT-B-32", SVFT(pattern="random", off_diagonals=8), None, 778_176),
    ("ViT-B-32", SVFT(pattern="banded", off_diagonals=16), None, 1_501_056),
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
    ("name", "adapter", "targets", "expected"), marked(COUNTS, lambda row: COUNTS.index(row) % 2 == 0)
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


def test_the_report_of_a_method_without_tensors() -> None:
    report = inject(One(3, 4), LinearProbe())
    assert "LinearProbe: 0 of 16 parameters train (0.00 %)" in str(report).splitlines()
    assert report.rows == []


ALL_ADAPTERS = [
    RandLoRA(rank=4),
    LoRA(rank=4),
    VeRA(rank=8),
    NoLA(rank=2, num_bases=8),
    DoRA(LoRA(rank=2)),
    DoRA(RandLoRA(rank=4)),
    RandLoRA(rank=4, qkv="split"),
]


@covered(("adapter", "custom_text"), ALL_ADAPTERS, [False, True], strength=1)
def test_both_towers_of_open_clip_learn(adapter: Adapter, custom_text: bool) -> None:
    plain = zoo.small_clip(custom_text)
    model = copy.deepcopy(plain)
    inject(model, adapter)
    frozen = {name: value.clone() for name, value in plain.state_dict().items()}
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.01)
    pictures, words = zoo.images(), zoo.captions()
    assert_close(model.encode_image(pictures), plain.encode_image(pictures), 1e-5)
    seen: set[str] = set()
    for _ in range(2):
        optimizer.zero_grad()
        (model.encode_image(pictures) - model.encode_text(words)).square().sum().backward()
        seen |= {
            name for name, value in trainable_parameters(model).items() if value.grad is not None and value.grad.any()
        }
        optimizer.step()
    assert seen == set(trainable_parameters(model))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in frozen.items())
    image, text = model.encode_image(pictures), model.encode_text(words)
    merge_and_unload(model)
    assert_close(model.encode_image(pictures), image, 1e-5)
    assert_close(model.encode_text(words), text, 1e-5)
    assert (image - plain.encode_image(pictures)).abs().max() > 1e-4
    assert model.state_dict().keys() == frozen.keys()


def test_gradient_checkpointing_of_open_clip_and_timm() -> None:
    clip = zoo.small_clip()
    inject(clip, RandLoRA(rank=4))
    vit = zoo.small_vit()
    inject(vit, RandLoRA(rank=4))
    for model, run in ((clip, clip.encode_image), (vit, vit)):
        randomise(model)
        model.train()
        pictures, values = zoo.images(), list(trainable_parameters(model).values())
        gradients = []
        for on in (False, True):
            model.set_grad_checkpointing(on)
            gradients.append(torch.autograd.grad(run(pictures).square().sum(), values, allow_unused=True))
        for first, second in zip(*gradients, strict=True):
            assert (first is None) == (second is None)
            assert first is None or torch.equal(first, second)


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


def test_a_float64_model_gets_a_float64_adapter() -> None:
    model = One(6, 8).double()
    inject(model, DoRA(RandLoRA(rank=2)), ["fc"])
    randomise(model)
    assert {value.dtype for value in model.parameters()} == {torch.float64}
    assert delta_weights(model)["fc"].dtype == torch.float64


def test_methods_draw_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    model = zoo.small_clip()
    after_building = torch.get_rng_state()
    for adapter in (*ALL_ADAPTERS, BitFit()):
        inject(copy.deepcopy(model), adapter)
    assert torch.equal(torch.get_rng_state(), after_building)
    assert not torch.equal(before, after_building)


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another() -> None:
    def tensors(seed: int | None) -> list[Tensor]:
        torch.manual_seed(7)
        model = zoo.small_vit()
        torch.manual_seed(int(torch.randint(1000, ())))
        inject(model, DoRA(RandLoRA(rank=4, seed=seed)))
        return [*trainable_parameters(model).values(), *(buffer for _, buffer in model.named_buffers())]

    assert all(torch.equal(a, b) for a, b in zip(tensors(3), tensors(3), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors(None), tensors(0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(tensors(3), tensors(4), strict=True))


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
    with pytest.raises(UserError, match="has adapters already"):
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


def test_the_hash_does_not_depend_on_the_precision_of_the_copy() -> None:
    model = SelfAttention(12).bfloat16()
    assert hash_weights(model) == hash_weights(copy.deepcopy(model).float()) == hash_weights(model.double())


def test_the_hash_sees_large_weights_at_even_steps() -> None:
    model = nn.Linear(3000, 50)
    known = hash_weights(model)
    with torch.no_grad():
        model.weight += 0.5
    assert hash_weights(model) != known


def test_facts_of_the_generator(tmp_path: Path) -> None:
    report = inject(model := One(6, 8), RandLoRA(rank=2, seed=5))
    config = read_adapter(save_adapter(model, tmp_path / "adapter")).config
    facts = {"generator": "philox4x32-10/1", "seed": 5, "fingerprint": report.fingerprint}
    assert facts.items() <= config.items()
    assert len(report.fingerprint) == 64


def test_routing_attention_is_listed_and_has_no_update() -> None:
    model = SelfAttention(12)
    report = inject(model, LoRA(rank=2), ["o"])
    assert [row.layer for row in report.rows] == ["attn.out_proj"]
    assert list(adapted_layers(model)) == ["attn", "attn.out_proj"]
    assert list(delta_weights(model)) == ["attn.out_proj"]


def test_a_text_is_one_target() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    report = inject(model, RandLoRA(rank=2), "0", "1")
    assert [row.layer for row in report.rows] == ["0"] and report.targets == ["0"] and report.trained == ["1"]
