"""PEFT judges each method on one layer: update, output, and the gradients of the input and of all that trains."""

import pytest
import torch
from peft import HiraConfig, LoraConfig, OFTConfig, RandLoraConfig, VeraConfig

from randlora_pl.adapters import OFT, DoRA, HiRA, LoRA, RandLoRA, VeRA, delta_weights
from randlora_pl.adapters.methods.dora import DoRADelta
from randlora_pl.adapters.methods.hira import HiRADelta
from randlora_pl.adapters.methods.lora import LoRADelta
from randlora_pl.adapters.methods.oft import OFTDelta
from randlora_pl.adapters.methods.randlora import RandLoRADelta
from randlora_pl.adapters.methods.vera import VeRADelta
from tests.adapters.cases import assert_close
from tests.judges import oracle
from tests.support.products import in_one_item


def peft_pair(in_features: int, out_features: int, r: int) -> oracle.Pair:
    config = RandLoraConfig(r=r, randlora_alpha=20, target_modules=["fc"])
    adapter = RandLoRA(rank=r, alpha=20.0, pairing="peft", init="lambda")
    theirs, ours = oracle.adapt_both(in_features, out_features, config, adapter)
    layer, delta = theirs.get_submodule("base_model.model.fc"), ours.fc.delta
    assert isinstance(delta, RandLoRADelta)
    delta.bases.A, delta.bases.B = (
        layer.randlora_A["default"].permute(1, 0, 2).float(),  # type: ignore[index,operator,union-attr]
        layer.randlora_B["default"].float(),  # type: ignore[index,operator,union-attr]
    )
    tensors = {
        "lambda": (layer.randlora_lambda["default"], delta.lambdas, True),  # type: ignore[index]
        "gamma": (layer.randlora_gamma["default"], delta.gammas, False),  # type: ignore[index]
    }
    return oracle.Pair(theirs, ours, layer, tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize(("in_features", "out_features", "r"), oracle.SHAPES)
def test_randlora_equals_peft(in_features: int, out_features: int, r: int) -> None:
    pair = peft_pair(in_features, out_features, r)
    for theirs, ours, turned in pair.tensors.values():
        assert torch.equal(theirs.T if turned else theirs, ours)  # the same start
    oracle.check_delta(pair)
    oracle.check(pair)


def test_the_equation_pairs_other_columns_than_peft() -> None:
    pair = peft_pair(12, 20, 4)
    pair.share()
    pair.delta.pairing = "equation"
    theirs = pair.their_layer.get_delta_weight("default")
    assert (delta_weights(pair.ours)["fc"] - theirs).abs().max() > 0.1 * theirs.abs().max()


def lora_pair(in_features: int, out_features: int, r: int, rslora: bool) -> oracle.Pair:
    config = LoraConfig(r=r, lora_alpha=7, target_modules=["fc"], use_rslora=rslora)
    theirs, ours = oracle.adapt_both(in_features, out_features, config, LoRA(rank=r, alpha=7.0, rslora=rslora))
    layer, delta = theirs.get_submodule("base_model.model.fc"), ours.fc.delta
    assert isinstance(delta, LoRADelta)
    tensors = {
        "A": (layer.lora_A["default"].weight, delta.A, False),  # type: ignore[index]
        "B": (layer.lora_B["default"].weight, delta.B, False),  # type: ignore[index]
    }
    return oracle.Pair(theirs, ours, layer, tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("in_features", "out_features", "r"), oracle.SHAPES)
def test_lora_equals_peft(in_features: int, out_features: int, r: int, rslora: bool) -> None:
    pair = lora_pair(in_features, out_features, r, rslora)
    oracle.check_delta(pair)
    oracle.check(pair)


def vera_pair(in_features: int, out_features: int, r: int) -> oracle.Pair:
    config = VeraConfig(r=r, target_modules=["fc"])
    theirs, ours = oracle.adapt_both(in_features, out_features, config, VeRA(rank=r, alpha=float(r)))
    layer, delta = theirs.get_submodule("base_model.model.fc"), ours.fc.delta
    assert isinstance(delta, VeRADelta)
    delta.bases.A = layer.vera_A["default"][None]  # type: ignore[index]
    delta.bases.B = layer.vera_B["default"][:, None]  # type: ignore[index]
    tensors = {
        "b": (layer.vera_lambda_b["default"], delta.b, False),  # type: ignore[index]
        "d": (layer.vera_lambda_d["default"], delta.d, False),  # type: ignore[index]
    }
    return oracle.Pair(theirs, ours, layer, tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize(("in_features", "out_features", "r"), [*oracle.SHAPES, (8, 10, 30)])
def test_vera_equals_peft(in_features: int, out_features: int, r: int) -> None:
    pair = vera_pair(in_features, out_features, r)
    for theirs, ours, _ in pair.tensors.values():
        assert torch.equal(theirs, ours)  # the same start
    oracle.check_delta(pair)
    oracle.check(pair)


def dora_pair(in_features: int, out_features: int, r: int) -> oracle.Pair:
    config = LoraConfig(r=r, lora_alpha=7, target_modules=["fc"], use_dora=True)
    theirs, ours = oracle.adapt_both(in_features, out_features, config, DoRA(LoRA(rank=r, alpha=7.0)))
    layer, delta = theirs.get_submodule("base_model.model.fc"), ours.fc.delta
    assert isinstance(delta, DoRADelta)
    assert isinstance(delta.inner, LoRADelta)
    tensors = {
        "A": (layer.lora_A["default"].weight, delta.inner.A, False),  # type: ignore[index]
        "B": (layer.lora_B["default"].weight, delta.inner.B, False),  # type: ignore[index]
        "magnitude": (layer.lora_magnitude_vector["default"].weight, delta.magnitude, False),  # type: ignore[index]
    }
    return oracle.Pair(theirs, ours, layer, tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize(("in_features", "out_features", "r"), oracle.SHAPES)
def test_dora_equals_peft(in_features: int, out_features: int, r: int) -> None:
    pair = dora_pair(in_features, out_features, r)
    theirs, ours, _ = pair.tensors["magnitude"]
    assert_close(ours, theirs, 1e-6)  # the same start
    oracle.check(pair)


@in_one_item(("in_features", "out_features", "r"), oracle.SHAPES)
def test_hira_equals_peft(in_features: int, out_features: int, r: int) -> None:
    theirs, ours = oracle.adapt_both(in_features, out_features, HiraConfig(r=r, target_modules=["fc"]), HiRA(rank=r))
    layer, delta = theirs.get_submodule("base_model.model.fc"), ours.fc.delta
    assert isinstance(delta, HiRADelta)
    tensors = {name: (getattr(layer, f"hira_{name}")["default"], getattr(delta, name), False) for name in "AB"}
    pair = oracle.Pair(theirs, ours, layer, tensors)
    pair.share()
    assert_close(delta.change(torch.ones(out_features, in_features)), layer.get_delta_weight("default"))  # type: ignore[operator]
    oracle.check(pair)


@in_one_item(("in_features", "block"), [(12, 4), (20, 4), (16, 8), (23, 23)])
def test_oft_equals_peft(in_features: int, block: int) -> None:
    """With its series; its exact form has the inverse rotation, see tests/interop/peft/test_import.py."""
    config = OFTConfig(oft_block_size=block, target_modules=["fc"])
    theirs, ours = oracle.adapt_both(in_features, 12, config, OFT(block=block, neumann_terms=5))
    layer, delta = theirs.get_submodule("base_model.model.fc"), ours.fc.delta
    assert isinstance(delta, OFTDelta)
    tensors = {"Q": (layer.oft_R["default"].weight, delta.Q, False)}  # type: ignore[index]
    pair = oracle.Pair(theirs, ours, layer, tensors)  # type: ignore[arg-type]
    pair.share(0.1)
    turn = torch.block_diag(*delta.turn()) + torch.eye(in_features)
    assert_close(turn, layer.get_delta_weight("default"))  # type: ignore[operator]
    oracle.check(pair)
