"""Targets: aliases, towers and patterns on real model families, and every refusal."""

import copy
import re
from collections.abc import Callable
from typing import Any, Literal

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from randlora_pl.adapters import (
    LoRA,
    RandLoRA,
    disabled,
    inject,
    merge,
    merge_and_unload,
    trainable_parameters,
    unmerge,
)
from randlora_pl.adapters.select import select
from randlora_pl.adapters.sites import find_sites, reader_of, row_blocks
from randlora_pl.utils.errors import UserError
from tests.adapters import zoo
from tests.adapters.cases import METHODS, FewHeads, OneConv1D, randomise
from tests.support.products import in_one_item


def names(model: nn.Module, targets: list[str] | None = None, split: bool = False) -> list[str]:
    return [site.shape.layer for site in select(model, targets, split)]


def block_names(*fields: str, tower: str = "") -> list[str]:
    return [f"{tower}transformer.resblocks.{block}.{field}" for block in range(2) for field in fields]


IN, OUT, FC1, FC2 = "attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"
CLIP_TARGETS: list[tuple[list[str] | None, list[str]]] = [
    (None, [IN, FC1, FC2]),
    (["qkv"], [IN]),
    (["attn"], [IN, OUT]),
    (["mlp"], [FC1, FC2]),
    (["all"], [IN, OUT, FC1, FC2]),
    (["o"], [OUT]),
    (["fc1"], [FC1]),
    (["fc2"], [FC2]),
    (["q"], ["attn.q"]),
    (["k", "v"], ["attn.k", "attn.v"]),
    (["q", "o"], ["attn.q", OUT]),
    (["q", "qkv"], [IN]),
    (["fc2", "qkv"], [IN, FC2]),
    ([r".*c_\w+"], [FC1, FC2]),
    ([r"attn\..*"], [IN, OUT]),
    ([r"attn\.v"], ["attn.v"]),
]


@in_one_item(("targets", "fields"), CLIP_TARGETS)
def test_targets_in_both_towers_of_open_clip(targets: list[str] | None, fields: list[str]) -> None:
    assert names(zoo.small_clip(), targets) == block_names(*fields, tower="visual.") + block_names(*fields)
    custom = block_names(*fields, tower="visual.") + block_names(*fields, tower="text.")
    assert names(zoo.small_clip(custom_text=True), targets) == custom


@pytest.mark.parametrize("custom_text", [False, True])
def test_a_prefix_names_a_tower(custom_text: bool) -> None:
    model = zoo.small_clip(custom_text)
    text = "text." if custom_text else ""
    assert names(model, ["visual:mlp"]) == block_names(FC1, FC2, tower="visual.")
    assert names(model, ["text:mlp"]) == block_names(FC1, FC2, tower=text)
    mixed = names(model, ["visual:qkv", "text:fc1", r"visual:.*\.1\.mlp\.c_proj"])
    assert mixed == [
        "visual.transformer.resblocks.0.attn.in_proj",
        "visual.transformer.resblocks.1.attn.in_proj",
        "visual.transformer.resblocks.1.mlp.c_proj",
        *block_names(FC1, tower=text),
    ]
    assert names(model, ["visual:.*"]) == ["visual.conv1", *names(model, ["visual:all"])]


def test_splitting_takes_the_three_blocks_of_a_packed_weight() -> None:
    model = zoo.small_clip()
    blocks = ["attn.q", "attn.k", "attn.v"]
    assert names(model, ["visual:qkv"], split=True) == block_names(*blocks, tower="visual.")
    assert names(model, ["visual:q"], split=True) == block_names("attn.q", tower="visual.")
    assert names(model, ["visual:attn"], split=True) == block_names(*blocks, OUT, tower="visual.")
    thirds = {"q": (0, 32), "k": (32, 64), "v": (64, 96)}
    assert row_blocks(model, "visual.transformer.resblocks.0.attn") == thirds
    shapes = {site.shape.layer: (site.shape.out_features, site.shape.in_features) for site in select(model, None, True)}
    assert shapes["visual.transformer.resblocks.0.attn.k"] == (32, 32)


def test_timm_names() -> None:
    model = zoo.small_vit()
    assert names(model) == [f"blocks.{b}.{name}" for b in range(2) for name in ("attn.qkv", "mlp.fc1", "mlp.fc2")]
    assert names(model, ["o"]) == ["blocks.0.attn.proj", "blocks.1.attn.proj"]
    assert names(model, ["qkv"], split=True)[:3] == [
        "blocks.0.attn.qkv.q",
        "blocks.0.attn.qkv.k",
        "blocks.0.attn.qkv.v",
    ]
    assert names(model, ["v"]) == ["blocks.0.attn.qkv.v", "blocks.1.attn.qkv.v"]


def test_pytorch_and_transformers_names() -> None:
    encoder = nn.TransformerEncoderLayer(12, 3, 24)
    assert names(encoder) == ["self_attn.in_proj", "linear1", "linear2"]
    assert names(encoder, ["o"]) == ["self_attn.out_proj"]
    separate = zoo.Separate()
    attention = [f"vision.attention.{name}" for name in ("query", "key", "value")]
    language = [f"language.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    assert names(separate, ["qkv"]) == attention + language == names(separate, ["qkv"], split=True)
    assert names(separate, ["vision:mlp", "language:v"]) == ["vision.intermediate.dense", "language.v_proj"]
    assert names(separate) == [*attention, "vision.intermediate.dense", *language, "language.up_proj"]


def test_names_of_language_models() -> None:
    """Without transformers: modules of their names, one block each."""

    def block(*layers: str, own: str) -> nn.Module:
        model: Any = nn.Module()
        for layer in layers:
            parent = model
            *path, last = f"layers.0.{layer}".split(".")
            for name in path:
                if not hasattr(parent, name):
                    parent.add_module(name, nn.Module())
                parent = getattr(parent, name)
            parent.add_module(last, nn.Linear(6, 6))
        return model.get_submodule(own)  # type: ignore[no-any-return]

    llama = block(
        *(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        own="layers.0",
    )  # fmt: skip
    projections = [f"self_attn.{name}_proj" for name in "qkv"]
    assert names(llama) == [*projections, "mlp.up_proj", "mlp.down_proj"]
    assert names(llama, ["gate", "o"]) == ["self_attn.o_proj", "mlp.gate_proj"]
    assert len(names(llama, ["all"])) == 7
    bert = block(
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        "intermediate.dense", "output.dense", "pooler.dense", own="layers.0",
    )  # fmt: skip
    attention = ["attention.self.query", "attention.self.key", "attention.self.value"]
    assert names(bert) == [*attention, "intermediate.dense", "output.dense"]
    assert names(bert, ["o", "fc2"]) == ["attention.output.dense", "output.dense"]


def test_fewer_heads_for_k_and_v_than_for_q() -> None:
    model = FewHeads()
    assert row_blocks(model, "qkv_proj") == {"q": (0, 16), "k": (16, 24), "v": (24, 32)}
    sites = {site.shape.layer: (site.shape.out_features, site.rows) for site in select(model, None, True)}
    assert sites == {"qkv_proj.q": (16, (0, 16)), "qkv_proj.k": (8, (16, 24)), "qkv_proj.v": (8, (24, 32))}
    assert names(model) == ["qkv_proj"]


@pytest.mark.parametrize(("targets", "split"), [(["q"], False), (["qkv"], True), (["v"], True)])
def test_blocks_that_nothing_tells_apart_are_refused(targets: list[str], split: bool) -> None:
    """k and v of cross-attention in one weight, as in GPT-2."""
    model = OneConv1D(12, 24, "c_attn")
    with pytest.raises(UserError, match="c_attn"):
        select(model, targets, split)
    assert names(model) == ["c_attn"]


def test_a_layer_is_conv1d_by_its_class_name_and_shapes() -> None:
    assert names(OneConv1D(12, 20)) == ["fc"]

    class Conv1D(nn.Module):  # of this name, and something else
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 3, 2))
            self.bias = nn.Parameter(torch.zeros(4))

    assert find_sites(nn.ModuleDict({"fc": Conv1D()})) == []
    assert find_sites(nn.ModuleDict({"fc": nn.Conv1d(3, 4, 2)})) == []


def test_a_model_without_known_names_is_adapted_whole() -> None:
    assert names(zoo.mlp()) == ["enter", "middle", "leave"] == names(zoo.mlp(), ["all"])
    assert names(zoo.mlp(), ["middle"]) == ["middle"]
    assert names(nn.Linear(3, 4)) == [""] == names(nn.Linear(3, 4), [".*"])
    assert names(nn.MultiheadAttention(12, 3)) == ["in_proj", "out_proj"]
    assert names(nn.MultiheadAttention(12, 3), ["qkv"], split=True) == ["q", "k", "v"]


def test_sites_say_kind_role_and_path() -> None:
    sites = {site.shape.layer: site for site in find_sites(zoo.small_vit())}
    packed, block, plain = (sites[f"blocks.0.{name}"] for name in ("attn.qkv", "attn.qkv.k", "mlp.fc1"))
    assert (packed.kind, packed.role, packed.block, packed.path) == ("qkv", "qkv", None, "blocks.0.attn.qkv")
    assert (block.kind, block.role, block.block, block.path) == ("k", "k", "k", "blocks.0.attn.qkv")
    assert (plain.kind, plain.role, plain.block, plain.path) == ("linear", "fc1", None, "blocks.0.mlp.fc1")


# Refusals


@in_one_item(
    ("targets", "message"),
    [
        (["mpl"], r"target 'mpl' matches no layer.* Did you mean 'mlp'"),
        (["c_proy"], r"Did you mean 'c_proj'"),
        (["visual.transformer.resblocks.0.mlp.cfc"], r"Did you mean 'visual.transformer.resblocks.0.mlp.c_fc'"),
        (
            ["qkv", "xyz"],
            r"target 'xyz' matches no layer of the model. Layers are named as 'visual.conv1.*Aliases: qkv attn mlp",
        ),
        (["audio:mlp"], r"this model has no tower 'audio'. Top-level parts: transformer, visual"),
        (["visual:zzzzzz"], r"target 'visual:zzzzzz' matches no layer"),
        (["mlp("], r"target 'mlp\(' is not a regular expression"),
        ([], r"targets is empty"),
    ],
)
def test_targets_that_match_nothing(targets: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(zoo.small_clip(), targets, False)


# Defaults


DEFAULTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "resnet18": (
        lambda: timm.create_model("resnet18"),
        "0 of 1 linear layers, 19 of 20 convolutions, 100 % of the weights of the blocks; skipped: fc, conv1",
    ),
    "convnext": (
        lambda: timm.create_model("convnext_atto"),
        "0 of 1 linear layers, 39 of 40 convolutions, 100 % of the weights of the blocks; skipped: head.fc, stem.0",
    ),
    "swiftformer": (
        lambda: timm.create_model("swiftformer_xs"),
        "16 of 18 linear layers, 0 of 61 convolutions (`conv`: 59), 8.85 % of the weights of the blocks; "
        "skipped: head, head_dist",
    ),
    "pvt": (
        lambda: timm.create_model("pvt_v2_b0"),
        "32 of 41 linear layers (the paper's choice; `all`: 40), "
        "0 of 18 convolutions (`conv`: 17), 65 % of the weights of the blocks; "
        "skipped: 8 x stages.*.blocks.*.attn.proj, head",
    ),
    "packed q and k": (
        lambda: timm.create_model("convit_tiny"),
        "46 of 69 linear layers (the paper's choice; `all`: 68), "
        "0 of 1 convolutions, 91.7 % of the weights of the blocks; "
        "skipped: 12 x blocks.*.attn.proj, 10 x blocks.*.attn.pos_proj, head",
    ),
    "a classifier in two parts": (
        lambda: timm.create_model("lowformer_b0"),
        "0 of 2 linear layers, 54 of 56 convolutions, 83.6 % of the weights of the blocks; "
        "skipped: pre_classifier.0, classifier, stem.0.conv, in_conv.conv",
    ),
    "linear layers of positions alone": (
        lambda: timm.create_model("coatnet_rmlp_0_rw_224"),
        "0 of 19 linear layers (`all`: 18), 65 of 67 convolutions, > 99 % of the weights of the blocks; "
        "skipped: 9 x stages.*.blocks.*.attn.rel_pos.mlp.fc1, 9 x stages.*.blocks.*.attn.rel_pos.mlp.fc2, head.fc, "
        "and 2 more",
    ),
    "linear layers that mix kernels": (
        lambda: timm.create_model("tf_efficientnet_cc_b0_4e"),
        "0 of 9 linear layers (`all`: 8), 53 of 57 convolutions (`conv`: 55), 7.53 % of the weights of the blocks; "
        "skipped: 8 x blocks.*.*.routing_fn, classifier, conv_stem, and 3 more",
    ),
    "small squeezes": (
        lambda: timm.create_model("efficientnet_b0"),
        "0 of 1 linear layers, 77 of 81 convolutions (`conv`: 79), > 99 % of the weights of the blocks; "
        "skipped: classifier, conv_stem, "
        "blocks.1.0.se.conv_reduce (rank above 4), and 2 more",
    ),
    "torchvision vit": (
        lambda: torchvision.models.vit_b_16(),
        "36 of 49 linear layers (the paper's choice; `all`: 48), "
        "0 of 1 convolutions, 91.7 % of the weights of the blocks; "
        "skipped: 12 x encoder.layers.encoder_layer_*.self_attention.out_proj, heads.head",
    ),
    "torchvision convnext": (
        lambda: torchvision.models.convnext_tiny(),
        "36 of 37 linear layers, 0 of 22 convolutions (`conv`: 21), 93.3 % of the weights of the blocks; "
        "skipped: classifier.2",
    ),
    "RN50": (
        lambda: zoo.clip_on_meta("RN50"),
        "40 of 52 linear layers (`all`: 52), 52 of 55 convolutions, 95.9 % of the weights of the blocks; "
        "skipped: 12 x transformer.resblocks.*.attn.out_proj, visual.conv1, visual.conv2, visual.conv3",
    ),
}


@in_one_item("name", DEFAULTS)
def test_defaults_take_the_blocks_and_say_what_they_leave(name: str) -> None:
    build, expected = DEFAULTS[name]
    with torch.device("meta"):
        model = build()
    assert inject(model, RandLoRA(rank=6)).coverage.line == expected


def test_layers_that_are_numbers_are_named() -> None:
    report = inject(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), LoRA(rank=2), ["^1"])
    assert report.coverage.line.endswith("; skipped: 0, 2")


def test_other_names_of_q_k_and_v() -> None:
    model = nn.Sequential(nn.ModuleDict({name: nn.Linear(4, 4) for name in ("wq", "wk", "wv", "wo")}))
    assert names(model, ["qkv"]) == ["0.wq", "0.wk", "0.wv"]


@pytest.mark.parametrize("name", ["edgenext_small", "caformer_s18", "coat_lite_tiny"])
def test_attention_under_another_name_has_an_output_projection(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert [layer.rpartition(".")[2] for layer in names(model, ["attn"])[:2]] == ["qkv", "proj"]


@pytest.mark.parametrize("name", ["swinv2_cr_tiny_ns_224", "vit_relpos_small_patch16_224"])
def test_networks_of_positions_are_not_mlps_of_blocks(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **({"rel_pos_type": "mlp"} if "relpos" in name else {}))
    report = inject(model, RandLoRA(rank=4))
    layers = [row.layer for row in report.rows]
    assert layers and all(
        re.search(r"\.(attn\.qkv|mlp\.fc[12])$", layer) and "rel_pos" not in layer for layer in layers
    )
    assert re.search("skipped: .*(meta_mlp|rel_pos)", report.coverage.line)


def test_defaults_of_texts_leave_the_language_head() -> None:
    transformers = pytest.importorskip("transformers", reason="pip install '.[language]'")
    sizes = {"vocab_size": 50, "num_hidden_layers": 2, "num_layers": 2}
    neox = transformers.GPTNeoXConfig(**sizes, hidden_size=16, num_attention_heads=2, intermediate_size=32)
    t5 = transformers.T5Config(**sizes, d_model=16, d_kv=8, d_ff=24, num_heads=2, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        models = transformers.GPTNeoXForCausalLM(neox), transformers.T5ForConditionalGeneration(t5)
    assert inject(models[0], LoRA(rank=2)).coverage.line == (
        "8 of 9 linear layers, 100 % of the weights of the blocks; skipped: lm_head"
    )
    last = {layer.rpartition(".")[2] for layer in names(models[1])}
    assert last == {"q", "k", "v", "wi_0", "wi_1", "wo"}


def test_conv_takes_what_the_rank_allows_and_names_are_refused() -> None:
    with torch.device("meta"):
        model = timm.create_model("mobilenetv3_small_050", num_classes=0)
    with pytest.raises(UserError, match="smaller"):
        inject(model, LoRA(rank=16), ["conv_dw"])
    report = inject(model, LoRA(rank=16), ["conv"])
    assert "conv_dw (rank above 9)" in report.coverage.line
    assert not any("stem" in row.layer or min(row.shape) < 16 for row in report.rows)
    assert all(row.kind == "conv" for row in report.rows)


@pytest.mark.parametrize(("name", "target", "other"), [("resnet18", "all", "conv"), ("test_vit", "conv", "all")])
def test_the_alias_of_the_other_kind_is_named(name: str, target: str, other: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UserError, match=rf"'{other}'"):
        inject(model, LoRA(rank=2), [target])


def test_all_is_every_linear_layer_of_the_blocks() -> None:
    with torch.device("meta"):
        model = timm.create_model("swiftformer_xs")
    assert len(names(model, ["all"])) == 16
    assert {layer.rpartition(".")[2] for layer in names(model, ["all"])} == {"to_query", "to_key", "proj", "final"}


def test_a_text_tower_needs_a_visual_one() -> None:
    with pytest.raises(UserError, match="'text'"):
        select(zoo.small_vit(), ["text:mlp"], False)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match="ReLU"):
        select(nn.ReLU(), None, False)


def beit() -> nn.Module:
    return timm.models.Beit(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=0)


def eva() -> nn.Module:
    return timm.models.Eva(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=0, qkv_fused=True)


def swin_v2() -> nn.Module:
    model = timm.models.SwinTransformerV2(
        img_size=16, patch_size=2, embed_dim=24, depths=(1,), num_heads=(2,), window_size=4, num_classes=0
    )
    for norm in (model.layers[0].blocks[0].norm1, model.layers[0].blocks[0].norm2):
        nn.init.ones_(norm.weight)  # timm's zeros would hide the block
    return model


@pytest.mark.parametrize("build", [beit, eva, swin_v2])
@pytest.mark.parametrize("qkv", ["packed", "split"])
def test_a_packed_weight_that_its_parent_reads_acts(
    build: Callable[[], nn.Module], qkv: Literal["packed", "split"]
) -> None:
    """The parent reads W0 + delta, so merged and unmerged outputs are the same bits, and every update trains."""
    model = build().eval()
    image, keys = torch.randn(2, 3, 16, 16), list(model.state_dict())
    plain = model(image)
    with pytest.raises(UserError, match="weight"):
        inject(model, LoRA(rank=2, qkv=qkv, dropout=0.5))
    report = inject(model, RandLoRA(rank=4, qkv=qkv))
    assert sum("qkv" in row.layer for row in report.rows) == (3 if qkv == "split" else 1)
    assert torch.equal(model(image), plain)
    randomise(model)
    adapted = model(image)
    adapted.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable_parameters(model).values())
    twin = copy.deepcopy(model)
    with disabled(model):
        assert torch.equal(model(image), plain)
    merge(model)
    torch.testing.assert_close(model(image), adapted)
    with disabled(model):
        assert torch.equal(model(image), plain)
    unmerge(model)
    assert torch.equal(model(image), adapted) and torch.equal(twin(image), adapted)
    merge_and_unload(model)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(image), adapted)


def test_open_clip_with_a_timm_image_tower() -> None:
    def tower(name: str) -> nn.Module:
        with torch.device("meta"):
            return zoo.small_clip(custom_text=True, timm_model_name=name, timm_pool="token", image_size=224)

    works = names(tower("vit_tiny_patch16_224"), ["visual:qkv"])
    assert works == [f"visual.trunk.blocks.{block}.attn.qkv" for block in range(12)]
    assert len(names(tower("beit_base_patch16_224"), ["visual:qkv"])) == 12


class Reading(nn.Module):
    """Uses a layer's weight in a method that is no forward, from two levels above."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.ModuleDict({"fc": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
        self.reset()

    def reset(self) -> None:
        nn.init.zeros_(self.inside.other.weight)  # type: ignore[union-attr,arg-type]

    def helper(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.inside.fc.weight)  # type: ignore[union-attr,arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.inside.other.weight.dtype)  # type: ignore[union-attr]
        return self.inside["other"](self.helper(x))  # type: ignore[no-any-return]


def test_reading_a_weight_from_afar_is_found_and_setting_it_up_is_not_reading() -> None:
    assert names(Reading(), ["fc", "other"]) == ["inside.fc", "inside.other"]
    assert reader_of(Reading(), "inside.fc") is Reading
    assert reader_of(Reading(), "inside.other") is None


class Own(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_layers_that_compute_their_weight_are_refused() -> None:
    normalised = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.ModuleDict(
        {
            "fc": normalised,
            "attn": nn.utils.parametrizations.spectral_norm(nn.MultiheadAttention(12, 3), "in_proj_weight"),
        }
    )
    with pytest.raises(UserError, match="computes"):
        select(model, ["fc"], False)
    with pytest.raises(UserError, match="q/k/v"):
        select(model, ["qkv"], False)


def test_a_class_without_source_is_taken_as_it_is() -> None:
    space: dict[str, Any] = {"nn": nn}
    exec("class Blind(nn.Module):\n    def forward(self, x):\n        return self.fc(x)", space)
    model = space["Blind"]()
    model.fc = nn.Linear(4, 4)
    assert names(model, ["fc"]) == ["fc"]


class OwnAttention(nn.MultiheadAttention):
    pass


def test_layers_with_a_forward_of_their_own_are_refused() -> None:
    with pytest.raises(UserError, match="forward"):
        select(nn.ModuleDict({"fc": Own(4, 4)}), ["fc"], False)


@pytest.mark.parametrize(
    "attention",
    [OwnAttention(12, 3), nn.MultiheadAttention(12, 3, kdim=5, vdim=7)],
    ids=["subclass", "separate weights"],
)
def test_attention_out_of_reach_is_refused_not_left_out(attention: nn.Module) -> None:
    model = nn.ModuleDict({"attn": attention, "fc1": nn.Linear(4, 4)})
    for targets in (None, ["attn"], ["qkv"], ["q"], ["all"]):
        with pytest.raises(UserError, match="q/k/v"):
            select(model, targets, False)
    for target in ("o", "out_proj"):
        with pytest.raises(UserError, match=r"attn.out_proj"):
            select(model, [target], False)
    assert names(model, ["mlp"]) == ["fc1"]


def test_open_clip_s_own_attention_is_refused_not_left_out() -> None:
    model = zoo.small_clip(block_type="custom")
    assert any("in_proj_weight" in name for name, _ in model.named_parameters())
    with pytest.raises(UserError, match=r"visual.transformer.resblocks.0.attn"):
        select(model, None, False)
    assert names(model, ["visual:mlp"]) == block_names(FC1, FC2, tower="visual.")
    assert names(model, ["text:qkv"]) == block_names(IN)


def test_a_weight_that_two_modules_share_is_refused() -> None:
    model: Any = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "head": nn.Linear(4, 9), "fc": nn.Linear(4, 4)})
    model["head"].weight = model["embedding"].weight
    with pytest.raises(UserError, match=r"embedding.weight"):
        inject(model, LoRA(rank=2), [".*"])
    assert inject(model, LoRA(rank=2), ["fc"]).trainable == 16


@pytest.mark.parametrize("multi_query", [True, False])
def test_rows_of_gptbigcode(multi_query: bool) -> None:
    """One head for k and v: q, then k, then v, as its forward splits them. Many: head by head, which are no blocks."""
    transformers = pytest.importorskip("transformers", reason="pip install '.[language]'")
    config = transformers.GPTBigCodeConfig(
        n_embd=24, n_layer=1, n_head=4, vocab_size=50, n_positions=16, multi_query=multi_query
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    path = "transformer.h.0.attn.c_attn"
    if not multi_query:
        assert row_blocks(model, path) == {}
        with pytest.raises(UserError, match="c_attn"):
            inject(model, LoRA(rank=2), ["q", "v"])
        assert [row.layer for row in inject(model, LoRA(rank=2), ["qkv"]).rows] == [path]
        return
    assert row_blocks(model, path) == {"q": (0, 24), "k": (24, 30), "v": (30, 36)}
    with torch.no_grad():  # a k of zeros makes attention even, so that q does not matter
        model.get_submodule(path).weight[24:30] = 0
        model.get_submodule(path).bias[24:30] = 0
    ids = torch.arange(8)[None]
    plain = model(ids).logits
    inject(model, LoRA(rank=2, alpha=8.0), ["q"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    torch.testing.assert_close(model(ids).logits, plain)


def test_rows_of_codegen_are_not_thirds() -> None:
    """Its weight has four groups of heads, each with q, v and k."""
    transformers = pytest.importorskip("transformers", reason="pip install '.[language]'")
    config = transformers.CodeGenConfig(n_embd=32, n_layer=1, n_head=4, rotary_dim=4, vocab_size=50, n_positions=16)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="qkv_proj"):
        inject(model, LoRA(rank=2), ["v"])


@in_one_item(("sides", "shown"), [((0, 5), "5 x 0"), ((5, 0), "0 x 5")])
@in_one_item("method", ["kradapter", "oft-neumann", "vera", "lora"])
def test_weights_without_entries_are_skipped_and_refused_by_name(
    method: str, sides: tuple[int, int], shown: str
) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 12), nn.Linear(*sides))

    assert [row.layer for row in inject(model(), METHODS[method](4, "packed")).rows] == ["0"]
    with pytest.raises(UserError, match=rf"1 has no entries \({shown}\)"):
        inject(model(), METHODS[method](4, "packed"), ["1"])
