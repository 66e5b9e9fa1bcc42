"""What is exported to PEFT, what is refused, and that nothing wrong ever gets its final name."""

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from randlora_pl.adapters import (
    OFT,
    Adapter,
    AutoLoRA,
    BitFit,
    DoRA,
    HiRA,
    LoRA,
    LoRAXS,
    NoLA,
    PiSSA,
    RandLoRA,
    SHiRA,
    Together,
    VeRA,
    delta_weights,
    inject,
    load_adapter,
    save_adapter,
    set_train_mode,
    trainable_parameters,
)  # fmt: skip
from randlora_pl.adapters.methods.randlora import _arrange_for_peft
from randlora_pl.adapters.random_bases import WeightShape, exact_pattern, peft_count, sides
from randlora_pl.interop import peft_export
from randlora_pl.interop.peft_export import Difference, export_peft, to_peft
from randlora_pl.interop.peft_import import import_peft
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import SelfAttention, assert_close, randomise
from tests.adapters.zoo import captions, images, small_clip, small_vit
from tests.support.products import in_one_item, in_two_items, marked


def saved(base: nn.Module, adapter: Adapter, targets: list[str] | None, path: Path, **base_model: Any) -> nn.Module:
    model = copy.deepcopy(base)
    inject(model, adapter, targets)
    randomise(model, 0.5)
    save_adapter(model, path, base_model=base_model)
    return model.eval()


PROVEN: dict[str, Adapter] = {  # layers of one smaller side each
    "equation": RandLoRA(rank=5),
    "hadamard": RandLoRA(rank=5, basis="hadamard"),
    "hadamard, peft": RandLoRA(rank=5, basis="hadamard", pairing="peft", a_basis="signs"),
    "variant b": RandLoRA(rank=5, variant="b"),
    "few bases": RandLoRA(rank=5, num_bases=2, pairing="peft"),
    "floor+1 where r does not divide": RandLoRA(rank=5, num_bases="floor+1"),
    "alphas": RandLoRA(rank=5, alpha={r".*\.fc1": 3.0}),
    "ternary": RandLoRA(rank=5, basis="ternary"),
    "binary, dropout": RandLoRA(rank=5, basis="binary", dropout=0.1),
    "autolora, q k v apart": AutoLoRA(rank={r".*\.k": 2}, alpha={r".*\.q": 50.0}, qkv="split"),
    "autolora, bases": AutoLoRA(rank=5, alpha=30, select="bases"),
    "lora, q apart": LoRA(rank=3, alpha=2, qkv="split"),
    "lora, alpha 0": LoRA(rank=3, alpha={r".*\.q": 0.0, ".*": 2.0}, qkv="split"),
    "lora, ranks of q k v": LoRA(rank={r".*\.k": 2, ".*": 3}, alpha={r".*\.q": 5.0}, qkv="split", rslora=True),
    "hira": HiRA(rank=3, dropout=0.1),
    "hira, ranks": HiRA(rank={r".*0\..*": 2, ".*": 5}),  # filled up with zeros
    "oft, default": OFT(),
    "oft, one number": OFT(block={".*qkv": 3, ".*fc1": 3, ".*": 12}),
    "oft, series": OFT(block=4, neumann_terms=6),
    "shira": SHiRA(rank=3, dropout=0.1),
    "shira, top": SHiRA(rank=2, places="top"),
    "pissa, alpha": PiSSA(rank=3, alpha=6.0, dropout=0.1),
    "pissa, ranks": PiSSA(rank={r".*fc1": 2, ".*": 4}, qkv="split"),
    "olora": PiSSA(rank=3, start="olora", keep_derived=True),
    "minor": PiSSA(rank=3, start="minor"),
    "loraxs, both": LoRAXS(rank=5, balance="both", qkv="split"),
}
ALIKE = {"hira": "hira_", "oft": "oft_R", "shira": "shira_weight"}
"""Methods that are the same in PEFT, and a part of the names of what trains there."""
OFTEN = (
    *("hadamard, peft", "variant b", "floor+1 where r does not divide", "alphas", "autolora, q k v apart"),
    *("autolora, bases", "lora, alpha 0", "lora, ranks of q k v", "hira", "hira, ranks", "oft, one number"),
    *("oft, series", "shira", "pissa, ranks", "olora", "loraxs, both"),
)


@in_two_items("name", marked(zip(PROVEN), lambda row: row[0] in OFTEN))
def test_peft_gives_our_outputs_and_they_come_back(name: str, tmp_path: Path) -> None:
    adapter, base = PROVEN[name], small_vit()
    ours = saved(base, adapter, None, tmp_path / "ours")
    found = export_peft(tmp_path / "ours", tmp_path / "peft", model=base).difference
    assert found is not None and found.change > 1e-2
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft", is_trainable=True).eval()
    x = images().double()  # large random updates make attention sharp, and rounding large
    outputs = [theirs.double().get_base_model()(x), ours.double()(x)]
    rounding = 2e-5 if isinstance(adapter, PiSSA | LoRAXS) else 2e-6  # the former follow from the base model
    assert_close(*outputs, rounding)
    method = name.partition(",")[0]
    if method in ALIKE and name != "hira, ranks":
        parameters = [value for key, value in theirs.named_parameters() if ALIKE[method] in key]
        sums = [
            sum(float(each.square().sum()) for each in torch.autograd.grad(output.square().sum(), values))
            for output, values in zip(outputs, (parameters, [*trainable_parameters(ours).values()]), strict=True)
        ]
        assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    again = import_peft(tmp_path / "peft", copy.deepcopy(base)).eval()
    assert_close(again.double()(x), outputs[1], rounding)


@in_one_item(("adapter", "rank"), [(PiSSA(rank=3, alpha=6.0, dropout=0.1), 6), (LoRAXS(rank=5, alpha=16.0), 5)])
def test_factors_that_follow_from_the_base_model_are_a_plain_lora(adapter: Any, rank: int, tmp_path: Path) -> None:
    """Of both signs of the factors for PiSSA."""
    base = small_vit()
    saved(base, adapter, None, tmp_path / "ours")
    export_peft(tmp_path / "ours", tmp_path / "peft", model=base)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["lora_dropout"] == adapter.dropout
    assert config["r"] == config["lora_alpha"] == rank


@in_one_item(
    ("adapter", "targets", "message"),
    [
        (NoLA(rank=3, num_bases=8), None, "PEFT does not have this method. Use --to lora --rank K .*adapter merge"),
        (
            Together([LoRA(rank=2), RandLoRA(rank=3)]),
            None,
            "PEFT has no sum of methods. Use --to lora --rank K .*adapter merge",
        ),
        (BitFit(), None, "PEFT does not have this method. Use `randlora-pl adapter merge`"),
        (DoRA(RandLoRA(rank=4)), None, "PEFT's DoRA wraps LoRA only, this one wraps RandLoRA"),
        (RandLoRA(rank=4, qkv="split"), None, "blocks.0.attn.qkv.q is a block of a packed weight"),
        (VeRA(rank=4), ["v"], "blocks.0.attn.qkv.v is a block of a packed weight"),
        (
            AutoLoRA(rank=4, select="bases", qkv="split"),
            None,
            r"\(AutoLoRA\) cannot .* a packed weight.* Use --to lora --rank K",
        ),
        (SHiRA(rank={".*qkv": 2, ".*": 3}), None, "its layers have ranks 2 and 3; PEFT's SHiRA has one rank"),
        (
            OFT(block={".*qkv": 2, ".*fc1": 24, ".*": 4}),
            None,
            "its layers have blocks of 2 and 4 and 24; PEFT finds others for one size",
        ),
    ],
)
def test_refused(adapter: Adapter, targets: list[str] | None, message: str, tmp_path: Path) -> None:
    base = small_vit()
    saved(base, adapter, targets, tmp_path / "ours")
    for model in (base, None):
        with pytest.raises(UserError, match=message):
            export_peft(tmp_path / "ours", tmp_path / "peft", model=model)
    assert [entry.name for entry in tmp_path.iterdir()] == ["ours"]


@in_one_item("method", [RandLoRA(rank=4), VeRA(rank=4), DoRA(LoRA(rank=2)), HiRA(rank=2), OFT()])
def test_packed_attention_is_for_lora_only(method: Adapter, tmp_path: Path) -> None:
    base = small_clip()
    saved(base, method, ["visual:qkv"], tmp_path / "ours")
    with pytest.raises(UserError, match=r"blocks.0.attn.in_proj"):
        export_peft(tmp_path / "ours", tmp_path / "peft", model=base)


@in_one_item("adapter", [LoRA(rank=3, alpha=2), LoRA(rank=3, alpha=2, qkv="split"), PiSSA(rank=3), LoRAXS(rank=3)])
def test_low_rank_updates_of_packed_attention(adapter: Adapter, tmp_path: Path) -> None:
    base = small_clip()
    ours: Any = saved(base, adapter, None, tmp_path / "ours")
    export_peft(tmp_path / "ours", tmp_path / "peft", model=base)
    theirs: Any = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").get_base_model()
    x, text = images(), captions()
    assert_close(theirs.encode_image(x), ours.encode_image(x), 2e-5)
    assert_close(theirs.encode_text(text), ours.encode_text(text), 2e-5)


def test_a_projection_that_attention_only_reads(tmp_path: Path) -> None:
    base = SelfAttention(12)
    for adapter in (PiSSA(rank=2), LoRA(rank=2)):
        saved(base, adapter, ["attn.out_proj"], tmp_path / "ours")
        named = rf"ours \({adapter.method()}\) cannot be a PEFT adapter: nn.MultiheadAttention reads .* weights\.$"
        with pytest.raises(UserError, match=named):
            export_peft(tmp_path / "ours", tmp_path / "peft", model=base)
    with pytest.raises(UserError, match=r"nn.MultiheadAttention"):
        export_peft(tmp_path / "ours", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_nothing_else_is_adapted(tmp_path: Path) -> None:
    """The text tower's names end the image tower's, and ``patch_embed.proj`` ends as ``attn.proj`` does."""
    base = small_clip()
    saved(base, LoRA(rank=2), ["text:mlp"], tmp_path / "text")
    export_peft(tmp_path / "text", tmp_path / "peft", model=base)
    names = set(load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft")
    adapted = {name for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {name.rpartition(".lora_")[0] for name in names}
    assert not any("visual" in name for name in adapted)
    vit = small_vit()
    saved(vit, RandLoRA(rank=4, pairing="peft"), ["o"], tmp_path / "vit")
    export_peft(tmp_path / "vit", tmp_path / "vit-peft", model=vit)
    # PEFT matches parameters by the end of their name and cannot tell the towers apart.
    saved(base, LoRA(rank=2), ["text:qkv"], tmp_path / "packed")
    with pytest.raises(UserError, match=r"visual.transformer.resblocks.0.attn"):
        export_peft(tmp_path / "packed", tmp_path / "packed-peft", model=base)
    assert not (tmp_path / "packed-peft").exists()


def test_a_wrong_file_never_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = small_vit()
    saved(base, RandLoRA(rank=5, pairing="peft"), None, tmp_path / "ours")

    def wrong(*args: Any) -> Any:
        adapter = to_peft(*args)
        adapter.tensors["randlora_A"] = adapter.tensors["randlora_A"] * 1.001
        return adapter

    monkeypatch.setattr(peft_export, "to_peft", wrong)
    with pytest.raises(UserError, match="PEFT"):
        export_peft(tmp_path / "ours", tmp_path / "peft", model=base)
    assert [entry.name for entry in tmp_path.iterdir()] == ["ours"]


def test_without_peft_or_a_model_it_is_written_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = small_vit()
    saved(base, RandLoRA(rank=5, pairing="peft", alpha=7.5, seed=4), None, tmp_path / "ours")
    saved(base, PiSSA(rank=3), None, tmp_path / "pissa")
    with pytest.raises(UserError, match=r"does not name its base model.*export_peft\(ADAPTER, DIR, model=model\)"):
        export_peft(tmp_path / "pissa", tmp_path / "none")
    done = export_peft(tmp_path / "ours", tmp_path / "one")
    assert (done.difference, done.why) == (None, "the adapter does not name its base model")
    monkeypatch.setattr(peft_export, "installed", lambda: False)
    done = export_peft(tmp_path / "ours", tmp_path / "two", model=base)
    assert (done.difference, done.why) == (None, "peft is not installed")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["randlora_alpha"], config["projection_prng_key"], config["r"]) == (7.5, 4, 5)


def test_the_folder_of_something_else_stays(tmp_path: Path) -> None:
    base = small_vit()
    saved(base, LoRA(rank=2), None, tmp_path / "ours")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="PEFT"):
        export_peft(tmp_path / "ours", tmp_path / "peft", model=base)
    assert (tmp_path / "peft" / "thesis.tex").read_text() == "x"
    (tmp_path / "peft" / "thesis.tex").unlink()
    export_peft(tmp_path / "ours", tmp_path / "peft", model=base)
    export_peft(tmp_path / "ours", tmp_path / "peft", model=base)  # its own output is replaced


def test_plain_convolutions_go_to_peft_and_others_are_refused(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4))
    x = torch.randn(2, 3, 12, 12)
    for adapter in (LoRA(rank=3, alpha=2), HiRA(rank=2)):
        ours = saved(base, adapter, ["0"], tmp_path / "ours")
        export_peft(tmp_path / "ours", tmp_path / "peft", model=base)
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft")
        assert_close(theirs.get_base_model()(x), ours(x))
        assert not torch.allclose(ours(x), base(x), atol=1e-3)
    others = [(LoRA(rank=3), "2"), *((each, "0") for each in (DoRA(LoRA(rank=3)), RandLoRA(pairing="peft"), OFT()))]
    for adapter, target in others:
        saved(base, adapter, [target], tmp_path / "other")
        with pytest.raises(UserError, match="convolution"):
            export_peft(tmp_path / "other", tmp_path / "none", model=base)
    assert not (tmp_path / "none").exists()


def test_a_comparison_says_which_difference_counts() -> None:
    assert "float64" not in Difference(1e-7, 0.5, 1.0).summary()
    words = Difference(1.7, 0.5, 1.0, exact=1.6e-9).summary()
    assert words.startswith("1.6e-09 in float64") and "1.7e+00 in float32" in words


def test_heads_and_statistics_that_trained_whole_go_along_and_come_back(tmp_path: Path) -> None:
    base = nn.Sequential(OrderedDict(body=nn.Linear(6, 6), norm=nn.BatchNorm1d(6), head=nn.Linear(6, 2))).eval()
    ours, x = copy.deepcopy(base), torch.randn(4, 6)
    inject(ours, LoRA(rank=2), ["body"], ["norm", "head"])
    randomise(ours)
    set_train_mode(ours)
    ours(3 + x)
    set_train_mode(ours, False)
    save_adapter(ours, tmp_path / "ours")
    export_peft(tmp_path / "ours", tmp_path / "peft", model=base)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").eval()
    assert_close(theirs(x), ours(x), 1e-5)
    save_adapter(import_peft(tmp_path / "peft", copy.deepcopy(base)), tmp_path / "back")
    fresh = load_adapter(again := copy.deepcopy(base), tmp_path / "back")
    assert_close(again(x), ours(x), 1e-5)
    assert {"norm.running_mean", "norm.running_var"} <= set(fresh.kept)


def test_a_module_whose_name_peft_would_confuse(tmp_path: Path) -> None:
    base = nn.Sequential(*(nn.Linear(4, 4) for _ in range(11)), nn.ReLU())
    inject(ours := copy.deepcopy(base), LoRA(rank=2), ["^0$"], ["1"])
    save_adapter(ours, tmp_path / "ours")
    with pytest.raises(UserError, match="for 11 as well"):
        export_peft(tmp_path / "ours", tmp_path / "peft", model=base)


def by_pairs(a: Tensor, b: Tensor, lambdas: Tensor, gammas: Tensor, large: int, small: int) -> Tensor:
    """PEFT's update (M, m) without its scaling: column p of B (M, n, r) goes with row (p // n, p % n)."""
    rank, count = lambdas.shape
    update = torch.zeros(large, small, dtype=torch.float64)
    for p in range(rank * count):
        column = b[:large, p // rank, p % rank].double()
        row = lambdas[p // count, p % count] * a[p // count, 0, :small].double() * gammas[p % count]
        update += column[:, None] * row
    return update


@settings(max_examples=30, derandomize=True)
@given(
    st.integers(2, 9),
    st.integers(2, 9),
    st.integers(1, 4),
    st.sampled_from(["equation", "peft"]),
    st.sampled_from(["uniform", "ternary", "hadamard"]),
    st.sampled_from(["ceil", "floor+1", 1, 2, "b"]),
)
def test_the_arranged_bases_give_our_update(
    outputs: int, inputs: int, rank: int, pairing: Any, basis: Any, bases: Any
) -> None:
    rank = min(rank, outputs, inputs)
    options = {"variant": "b"} if bases == "b" else {"num_bases": bases}
    adapter = RandLoRA(rank=rank, alpha=float(rank), pairing=pairing, basis=basis, **options)
    # Two layers of one smaller side, so that the bases are larger than the first one needs.
    model = nn.ModuleDict(
        {"one": nn.Linear(inputs, outputs), "two": nn.Linear(max(inputs, outputs) + 3, min(inputs, outputs))}
    )
    inject(model.double(), adapter, [".*"])
    for parameter in trainable_parameters(model).values():
        nn.init.normal_(parameter)
    shapes = [WeightShape("one", outputs, inputs), WeightShape("two", min(inputs, outputs), max(inputs, outputs) + 3)]
    delta: Any = model["one"].delta
    count = peft_count(shapes[0].small, rank)
    try:
        a, b = _arrange_for_peft(adapter, shapes, delta.bases)
    except UserError:
        assert adapter.bases_of(shapes[0]) > count  # the only reason here
        return
    small, large = sorted(sides(shapes))
    assert a.shape == (rank, 1, small)
    assert b.shape == (large, peft_count(small, rank), rank)
    more = count - len(delta.lambdas)
    lambdas, gammas = (torch.cat([t.detach(), t.new_zeros(more, t.shape[1])]) for t in (delta.lambdas, delta.gammas))
    expected = by_pairs(a, b, lambdas.T, gammas, shapes[0].large, shapes[0].small)
    ours = delta_weights(model)["one"]
    torch.testing.assert_close(ours if outputs >= inputs else ours.T, expected, rtol=1e-5, atol=1e-5)


WIDE, SMALL = WeightShape("a", 20, 12), WeightShape("b", 6, 18)


@in_one_item(
    ("adapter", "shapes", "message"),
    [
        (RandLoRA(rank=3, variant="a"), [WIDE], "variant a is a product of two sums"),
        (RandLoRA(rank=3, lead=2), [WIDE], "it has columns of its own"),
        (RandLoRA(rank={"a": 3, "b": 2}), [WIDE, SMALL], "its layers have ranks 2 and 3; PEFT's RandLoRA has one"),
        (
            RandLoRA(rank=3),
            [WIDE, SMALL],
            "its layers have 2 and 4 bases, and pairing: equation permutes all of them alike",
        ),
        (RandLoRA(rank=3, num_bases="floor+1"), [WIDE], "it has 5 bases of rank 3; PEFT makes 4"),
        (
            RandLoRA(rank=3, num_bases=1, pairing="peft"),
            [WIDE, SMALL],
            "its layers have 1 bases, and num_bases: 1 rearranges all",
        ),
        (
            RandLoRA(rank=3, basis="hadamard", pairing="peft"),
            [WIDE, SMALL],
            "hadamard bases differ for the smaller sides 6 and 12",
        ),
    ],
)  # fmt: skip
def test_what_peft_has_no_bases_for(adapter: RandLoRA, shapes: list[WeightShape], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _arrange_for_peft(adapter, shapes, adapter.bases(shapes, torch.device("cpu")))


@settings(max_examples=25, derandomize=True)
@given(st.sets(st.from_regex(r"([a-c]\.)?([0-3]\.){0,2}[d-f](\.[g-h])?", fullmatch=True), min_size=1, max_size=12))
def test_a_pattern_fits_exactly_its_names(names: set[str]) -> None:
    import re

    pattern = re.compile(exact_pattern(sorted(names)))
    others = (
        {f"x.{name}" for name in names} | {f"{name}x" for name in names} | {name.replace("0", "9") for name in names}
    )
    others |= {name.replace("d", "e") for name in names} | {name.replace("1", "2") for name in names}
    assert all(pattern.fullmatch(name) for name in names)
    assert not any(pattern.fullmatch(name) for name in others - names)


def test_a_pattern_is_short() -> None:
    names = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("fc1", "fc2")]
    assert exact_pattern(names) == r"blocks\.(?:0|1)(?:\.fc1|\.fc2)"
