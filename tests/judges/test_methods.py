"""PEFT judges each method on one layer: update, output, and the gradients of the input and of all that trains."""

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import HiraConfig, LoraConfig, OFTConfig, RandLoraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn

from randlora_pl.adapters import OFT, Adapter, DoRA, HiRA, LoRA, RandLoRA, VeRA, delta_weights, inject
from randlora_pl.adapters.random_bases import WeightShape, draw_peft_randlora, draw_peft_vera
from tests.adapters.cases import One, assert_close
from tests.support.products import covered, in_one_item

# in < out, in > out, square, and a rank of 5 that divides neither side.
SHAPES = [(12, 20, 4), (20, 12, 4), (16, 16, 4), (12, 22, 5), (23, 12, 5), (13, 13, 5)]


@dataclass
class Pair:
    """The same frozen layer under PEFT and under us, and which trainable tensors belong together."""

    theirs: nn.Module
    ours: One
    their_layer: Any
    delta: Any
    tensors: dict[str, tuple[nn.Parameter, nn.Parameter, bool]]  # theirs, ours, whether one is the transpose

    @torch.no_grad()
    def share(self, std: float = 0.3) -> None:
        """Random values for every trainable tensor of both."""
        for theirs, ours, turned in self.tensors.values():
            values = std * torch.randn_like(ours) + (ours if ours.dim() == 1 else 0)
            ours.copy_(values)
            theirs.copy_(values.T if turned else values)


def check(pair: Pair) -> None:
    """Update, output, and every gradient agree."""
    pair.share()
    x = torch.randn(7, 3, pair.ours.features)
    results: list[tuple[Tensor, ...]] = []
    for model, index in ((pair.theirs, 0), (pair.ours, 1)):
        entry = x.clone().requires_grad_()
        output = model(entry)
        values = [entry, *(tensors[index] for tensors in pair.tensors.values())]
        gradients = torch.autograd.grad((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum(), values)
        results.append((output, *gradients))
    turned = [False, False, *(turned for *_, turned in pair.tensors.values())]
    for theirs, ours, flip in zip(*results, turned, strict=True):
        assert_close(ours.T if flip else ours, theirs, 1e-5)


def check_delta(pair: Pair) -> None:
    """The updates agree as matrices."""
    pair.share()
    theirs = pair.their_layer.get_delta_weight("default").detach()
    assert_close(delta_weights(pair.ours)["fc"], theirs, 1e-5)
    assert theirs.abs().max() > 0.01


# Ours, and whether it is the transpose of PEFT's.
TENSORS: dict[str, dict[str, tuple[str, bool]]] = {
    "RandLoRA": {"randlora_lambda": ("lambdas", True), "randlora_gamma": ("gammas", False)},
    "LoRA": {"lora_A": ("A", False), "lora_B": ("B", False)},
    "VeRA": {"vera_lambda_b": ("b", False), "vera_lambda_d": ("d", False)},
    "DoRA": {"lora_A": ("inner.A", False), "lora_B": ("inner.B", False), "lora_magnitude_vector": ("magnitude", False)},
    "HiRA": {"hira_A": ("A", False), "hira_B": ("B", False)},
    "OFT": {"oft_R": ("Q", False)},
}


def pair_of(in_features: int, out_features: int, adapter: Adapter, config: type, **options: Any) -> Pair:
    """One layer under PEFT and under us, with the same random bases if there are any."""
    ours = One(in_features, out_features)
    base = copy.deepcopy(ours)
    inject(ours, adapter, ["fc"])
    theirs = get_peft_model(base, config(target_modules=["fc"], **options))
    layer: Any = theirs.get_submodule("base_model.model.fc")
    delta: Any = ours.fc.delta
    if isinstance(adapter, RandLoRA):
        delta.bases.A = layer.randlora_A["default"].permute(1, 0, 2).float()
        delta.bases.B = layer.randlora_B["default"].float()
    if isinstance(adapter, VeRA):
        delta.bases.A, delta.bases.B = layer.vera_A["default"][None], layer.vera_B["default"][:, None]
    tensors = {}
    for name, (own, turned) in TENSORS[adapter.method()].items():
        held = getattr(layer, name)["default"]
        tensors[own] = (getattr(held, "weight", held), delta.get_parameter(own), turned)
    return Pair(theirs, ours, layer, delta, tensors)


def randlora(in_features: int, out_features: int, r: int) -> Pair:
    adapter = RandLoRA(rank=r, alpha=20.0, pairing="peft", init="lambda")
    return pair_of(in_features, out_features, adapter, RandLoraConfig, r=r, randlora_alpha=20)


@in_one_item(("in_features", "out_features", "r"), SHAPES)
def test_randlora_and_vera_equal_peft(in_features: int, out_features: int, r: int) -> None:
    vera = VeRA(rank=r, alpha=float(r)), VeRA(rank=30, alpha=30.0)  # also more than any side
    pairs = [pair_of(in_features, out_features, each, VeraConfig, r=each.rank) for each in vera]
    for pair in (randlora(in_features, out_features, r), *pairs):
        for theirs, ours, turned in pair.tensors.values():
            assert torch.equal(theirs.T if turned else theirs, ours)  # the same start
        check_delta(pair)
        check(pair)


def test_the_equation_pairs_other_columns_than_peft() -> None:
    pair = randlora(12, 20, 4)
    pair.share()
    pair.delta.pairing = "equation"
    theirs = pair.their_layer.get_delta_weight("default")
    assert (delta_weights(pair.ours)["fc"] - theirs).abs().max() > 0.1 * theirs.abs().max()


@in_one_item(("in_features", "out_features", "r"), SHAPES)
def test_lora_and_dora_equal_peft(in_features: int, out_features: int, r: int) -> None:
    options: dict[str, Any] = {"config": LoraConfig, "r": r, "lora_alpha": 7}
    for rslora in (False, True):
        adapter = LoRA(rank=r, alpha=7.0, rslora=rslora)
        pair = pair_of(in_features, out_features, adapter, use_rslora=rslora, **options)
        check_delta(pair)
        check(pair)
    pair = pair_of(in_features, out_features, DoRA(LoRA(rank=r, alpha=7.0)), use_dora=True, **options)
    theirs, ours, _ = pair.tensors["magnitude"]
    assert_close(ours, theirs, 1e-6)  # the same start
    check(pair)


@in_one_item(("in_features", "out_features", "r"), SHAPES)
def test_hira_equals_peft(in_features: int, out_features: int, r: int) -> None:
    pair = pair_of(in_features, out_features, HiRA(rank=r), HiraConfig, r=r)
    pair.share()
    theirs = pair.their_layer.get_delta_weight("default")
    assert_close(pair.delta.change(torch.ones(out_features, in_features)), theirs)
    check(pair)


@in_one_item(("in_features", "block"), [(12, 4), (20, 4), (16, 8), (23, 23)])
def test_oft_equals_peft(in_features: int, block: int) -> None:
    """With its series; its exact form has the inverse rotation, see tests/interop/peft/test_relative.py."""
    pair = pair_of(in_features, 12, OFT(block=block, neumann_terms=5), OFTConfig, oft_block_size=block)
    pair.share(0.1)
    turn = torch.block_diag(*pair.delta.turn()) + torch.eye(in_features)
    assert_close(turn, pair.their_layer.get_delta_weight("default"))
    check(pair)


# PEFT's random bases from its seed alone, bit for bit


# Tall, wide, square, several at once; ranks that divide the smaller side and that do not, and one above it.
LAYERS = [
    ({"a": (8, 20)}, 4),
    ({"a": (20, 8)}, 3),
    ({"a": (9, 9)}, 2),
    ({"a": (6, 24), "b": (24, 6), "c": (10, 10)}, 5),
    ({"a": (4, 12)}, 6),
]
KINDS = [{}, {"sparse": True}, {"very_sparse": True}, {"sparse": True, "very_sparse": True}]


def adapted(layers: dict[str, tuple[int, int]], config: Any) -> tuple[Any, list[WeightShape]]:
    model = nn.ModuleDict({name: nn.Linear(*sizes) for name, sizes in layers.items()})
    config.target_modules = set(layers)
    return get_peft_model(model, config), [WeightShape(name, o, i) for name, (i, o) in layers.items()]  # type: ignore[arg-type]


@covered(("kind", "case", "key"), KINDS, LAYERS, [0, 7], strength=1)
def test_randlora(
    kind: dict[str, bool],
    case: tuple[dict[str, tuple[int, int]], int],
    key: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers, rank = case
    for dtype in (torch.bfloat16, torch.float16):  # the second where there is no bfloat16
        monkeypatch.setattr("peft.tuners.randlora.model.is_bf16_available", lambda dtype=dtype: dtype == torch.bfloat16)
        peft, shapes = adapted(layers, RandLoraConfig(r=rank, projection_prng_key=key, **kind))
        a, b = draw_peft_randlora(key, rank, shapes, dtype=dtype, **kind)
        assert torch.equal(a, peft.base_model.randlora_A["default"].float())
        assert torch.equal(b, peft.base_model.randlora_B["default"].float())
        assert not torch.equal(a, draw_peft_randlora(key + 1, rank, shapes, dtype=dtype, **kind)[0])


def test_the_two_dtypes_have_nothing_in_common_at_the_size_of_real_layers() -> None:
    shapes = [WeightShape("a", 256, 256)]
    for one, other in zip(
        *(draw_peft_randlora(0, 4, shapes, dtype=t) for t in (torch.bfloat16, torch.float16)), strict=True
    ):
        assert (one - other).abs().max() > 1


@in_one_item(("case", "key"), itertools.product(LAYERS, [0, 7]))
def test_vera(case: tuple[dict[str, tuple[int, int]], int], key: int) -> None:
    layers, rank = case
    peft, shapes = adapted(layers, VeraConfig(r=rank, projection_prng_key=key))
    a, b = draw_peft_vera(key, rank, shapes)
    assert torch.equal(a, peft.base_model.vera_A["default"])
    assert torch.equal(b, peft.base_model.vera_B["default"])
