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
from randlora_pl.adapters.sites import find_sites, is_router, reader_of, row_blocks
from randlora_pl.utils.errors import UserError
from tests.adapters import zoo
from tests.adapters.cases import METHODS, FewHeads, OneConv1D, randomise
from tests.judges import models
from tests.support.products import in_one_item


def names(model: nn.Module, targets: list[str] | None = None, split: bool = False) -> list[str]:
    return [site.shape.layer for site in select(model, targets, split)]


def block_names(*fields: str, tower: str = "") -> list[str]:
    return [f"{tower}transformer.resblocks.{block}.{field}" for block in range(2) for field in fields]


IN, OUT, FC1, FC2 = "attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"
CLIP_TARGETS: list[tuple[list[str] | None, list[str]]] = [
    (None, [IN, FC1, FC2]),
    (["attn"], [IN, OUT]),
    (["mlp"], [FC1, FC2]),
    (["all"], [IN, OUT, FC1, FC2]),
    (["o"], [OUT]),
    (["fc1"], [FC1]),
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


def test_names_of_timm_pytorch_and_transformers() -> None:
    model = zoo.small_vit()
    assert names(model) == [f"blocks.{b}.{name}" for b in range(2) for name in ("attn.qkv", "mlp.fc1", "mlp.fc2")]
    assert names(model, ["o"]) == ["blocks.0.attn.proj", "blocks.1.attn.proj"]
    assert names(model, ["qkv"], split=True)[:3] == [
        "blocks.0.attn.qkv.q",
        "blocks.0.attn.qkv.k",
        "blocks.0.attn.qkv.v",
    ]
    assert names(model, ["v"]) == ["blocks.0.attn.qkv.v", "blocks.1.attn.qkv.v"]
    encoder = nn.TransformerEncoderLayer(12, 3, 24)
    assert names(encoder) == ["self_attn.in_proj", "linear1", "linear2"]
    assert names(encoder, ["o"]) == ["self_attn.out_proj"]
    separate = zoo.Separate()
    attention = [f"vision.attention.{name}" for name in ("query", "key", "value")]
    language = [f"language.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    assert names(separate, ["qkv"]) == attention + language == names(separate, ["qkv"], split=True)
    assert names(separate, ["vision:mlp", "language:v"]) == ["vision.intermediate.dense", "language.v_proj"]
    assert names(separate) == [*attention, "vision.intermediate.dense", *language, "language.up_proj"]
    llama, bert = models.llama().layers[0], models.bert().encoder.layer[0]  # type: ignore[union-attr, index]
    projections = [f"self_attn.{name}_proj" for name in "qkv"]
    assert names(llama) == [*projections, "mlp.up_proj", "mlp.down_proj"]
    assert names(llama, ["gate", "o"]) == ["self_attn.o_proj", "mlp.gate_proj"]
    assert len(names(llama, ["all"])) == 7
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


def test_models_without_known_names_and_with_others() -> None:
    assert names(zoo.mlp()) == ["enter", "middle", "leave"] == names(zoo.mlp(), ["all"])
    assert names(zoo.mlp(), ["middle"]) == ["middle"]
    assert names(nn.Linear(3, 4)) == [""] == names(nn.Linear(3, 4), [".*"])
    assert names(nn.MultiheadAttention(12, 3)) == ["in_proj", "out_proj"]
    assert names(nn.MultiheadAttention(12, 3), ["qkv"], split=True) == ["q", "k", "v"]
    model = nn.Sequential(nn.ModuleDict({name: nn.Linear(4, 4) for name in ("wq", "wk", "wv", "wo")}))
    assert names(model, ["qkv"]) == ["0.wq", "0.wk", "0.wv"]
    report = inject(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), LoRA(rank=2), ["^1"])
    assert report.coverage.line.endswith("; skipped: 0, 2")


def test_sites_say_kind_role_and_path() -> None:
    sites = {site.shape.layer: site for site in find_sites(zoo.small_vit())}
    packed, block, plain = (sites[f"blocks.0.{name}"] for name in ("attn.qkv", "attn.qkv.k", "mlp.fc1"))
    assert (packed.kind, packed.role, packed.block, packed.path) == ("qkv", "qkv", None, "blocks.0.attn.qkv")
    assert (block.kind, block.role, block.block, block.path) == ("k", "k", "k", "blocks.0.attn.qkv")
    assert (plain.kind, plain.role, plain.block, plain.path) == ("linear", "fc1", None, "blocks.0.mlp.fc1")


# Refusals


class Own(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def computed() -> nn.Module:
    """Layers that compute their weight."""
    attention = nn.utils.parametrizations.spectral_norm(nn.MultiheadAttention(12, 3), "in_proj_weight")
    return nn.ModuleDict({"fc": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "attn": attention})


@in_one_item(
    ("build", "targets", "message"),
    [
        (zoo.small_clip, ["mpl"], r"target 'mpl' matches no layer.* Did you mean 'mlp'"),
        (zoo.small_clip, ["c_proy"], r"Did you mean 'c_proj'"),
        (zoo.small_clip, ["visual.transformer.resblocks.0.mlp.cfc"], "mean 'visual.transformer.resblocks.0.mlp.c_fc'"),
        (zoo.small_clip, ["qkv", "xyz"], "target 'xyz' matches no layer of the model. Layers are named as 'visual.con"),
        (zoo.small_clip, ["qkv", "xyz"], "Aliases: qkv attn mlp"),
        (zoo.small_clip, ["audio:mlp"], r"this model has no tower 'audio'. Top-level parts: transformer, visual"),
        (zoo.small_clip, ["visual:zzzzzz"], r"target 'visual:zzzzzz' matches no layer"),
        (zoo.small_clip, ["mlp("], r"target 'mlp\(' is not a regular expression"),
        (zoo.small_clip, [], r"targets is empty"),
        (zoo.small_vit, ["text:mlp"], "'text'"),  # which needs a visual one
        (zoo.small_vit, ["conv"], "'all'"),
        (lambda: zoo.timm_on_meta("resnet18"), ["all"], "'conv'"),
        (nn.ReLU, None, "ReLU"),
        (lambda: nn.ModuleDict({"fc": Own(4, 4)}), ["fc"], "forward"),
        (computed, ["fc"], "computes"),
        (computed, ["qkv"], "q/k/v"),
    ],
)
def test_targets_that_are_refused(build: Callable[[], nn.Module], targets: list[str] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(build(), targets, False)


# Defaults


DEFAULTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
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


@pytest.mark.parametrize("name", ["edgenext_small", "caformer_s18", "coat_lite_tiny"])
def test_attention_under_another_name_has_an_output_projection(name: str) -> None:
    model = zoo.timm_on_meta(name)
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
    model = zoo.timm_on_meta("mobilenetv3_small_050")
    with pytest.raises(UserError, match="smaller"):
        inject(model, LoRA(rank=16), ["conv_dw"])
    report = inject(model, LoRA(rank=16), ["conv"])
    assert "conv_dw (rank above 9)" in report.coverage.line
    assert not any("stem" in row.layer or min(row.shape) < 16 for row in report.rows)
    assert all(row.kind == "conv" for row in report.rows)


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


def test_reading_a_weight_from_afar_is_found_where_there_is_source() -> None:
    assert names(Reading(), ["fc", "other"]) == ["inside.fc", "inside.other"]
    assert reader_of(Reading(), "inside.fc") is Reading
    assert reader_of(Reading(), "inside.other") is None
    space: dict[str, Any] = {"nn": nn}
    exec("class Blind(nn.Module):\n    def forward(self, x):\n        return self.fc(x)", space)
    model = space["Blind"]()
    model.fc = nn.Linear(4, 4)
    assert names(model, ["fc"]) == ["fc"]


class OwnAttention(nn.MultiheadAttention):
    pass


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


# A report counts weights as well as layers, and warns where most stay frozen


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


def test_a_choice_of_the_user_is_not_warned_of_and_gates_may_be_no_routers() -> None:
    assert inject(mixture(), LoRA(rank=2), ["dense"]).coverage.warning == ""
    report = inject(mixture(), LoRA(rank=2), ["all"])
    assert report.coverage.warning and {row.layer for row in report.rows} == {"0.dense", "1.dense"}
    named = inject(mixture(), LoRA(rank=2), ["[01].gate", "dense"])
    assert {row.layer for row in named.rows} >= {"0.gate", "1.gate"}
    assert inject(mixture(), LoRA(rank=2), trained=["experts"]).coverage.share == pytest.approx(1 - 32 / 608)
    model = zoo.timm_on_meta("gmlp_s16_224")
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
    model = zoo.timm_on_meta("fastvit_mci2")
    other = copy.deepcopy(model)
    report = inject(model, LoRA(rank=2))
    assert report.coverage.line.startswith("8 of 8 linear layers, 0 of 235 convolutions (`conv`: 227), 18.9 % of the")
    assert "--model.targets '[all, conv]'" in report.coverage.warning
    assert not caplog.records  # a model without values is only counted
    assert inject(other, LoRA(rank=2), ["all", "conv"]).coverage.share > 0.9


def test_the_table_names_layers_of_other_shapes_and_says_which_are_left_out() -> None:
    with torch.device("meta"):
        report = inject(timm.create_model("pvt_v2_b0"), LoRA(rank=2))
    names = [name for name, *_ in report.grouped()]
    assert names[:2] == ["stages.0.blocks.*.attn.q", "stages.0.blocks.*.attn.kv"] and len(set(names)) == len(names)
    model = zoo.timm_on_meta("csatv2")
    report = inject(model, LoRA(rank=32))
    assert "14 x stages.*.*.attn.attn.qkv (rank above 1)" in report.coverage.line and report.coverage.warning
