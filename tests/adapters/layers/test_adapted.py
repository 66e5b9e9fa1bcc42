"""Adapted layers: nn.MultiheadAttention in all its options, transformer encoders, and what stays of a layer."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import LoRA, RandLoRA, delta_weights, disabled, inject, merge, merge_and_unload, unmerge
from randlora_pl.adapters.layers import AdaptedLinear
from tests.adapters.cases import assert_close, randomise
from tests.support.products import covered, in_one_item

EMBED, HEADS, BATCH, QUERIES, KEYS = 12, 3, 4, 5, 7


def by_hand(adapted: nn.Module, plain: nn.Module) -> nn.Module:
    """A plain model with W0 + delta written in: all that an adapted one may be."""
    twin = copy.deepcopy(plain)
    with torch.no_grad():
        for name, delta in delta_weights(adapted).items():
            path, _, last = name.rpartition(".")
            if last in ("in_proj", "q", "k", "v"):
                weight = twin.get_submodule(path).in_proj_weight
                rows = {"in_proj": slice(None), "q": slice(12), "k": slice(12, 24), "v": slice(24, 36)}[last]
                weight[rows] += delta  # type: ignore[index,operator]
            else:
                twin.get_submodule(name).weight += delta  # type: ignore[operator]
    return twin


def attention_pair(split: bool = False, **options: Any) -> tuple[nn.Module, nn.Module]:
    """An adapted attention layer and a plain one with the update written in."""
    plain = nn.MultiheadAttention(EMBED, HEADS, **options)
    for name, parameter in plain.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.3)
    adapted = copy.deepcopy(plain)
    inject(adapted, RandLoRA(rank=5, qkv="split" if split else "packed"), ["qkv", "out_proj"])
    randomise(adapted)
    return adapted, by_hand(adapted, plain)


def tensors(cross: bool, batch_first: bool, batched: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value; the same object thrice for self-attention."""

    def one(length: int) -> Tensor:
        if not batched:
            return torch.randn(length, EMBED)
        return torch.randn(BATCH, length, EMBED) if batch_first else torch.randn(length, BATCH, EMBED)

    query = one(QUERIES)
    return (query, one(KEYS), one(KEYS)) if cross else (query, query, query)


def masks(name: str, keys: int, batched: bool) -> dict[str, Tensor]:
    """Arguments that hide keys; nobody is left without any."""
    hidden = torch.rand(QUERIES, keys) > 0.6
    hidden[:, 0] = False
    rows = BATCH * HEADS if batched else HEADS
    several = torch.rand(rows, QUERIES, keys) > 0.6
    several[..., 0] = False
    padding = torch.rand(BATCH, keys) > 0.6 if batched else torch.rand(keys) > 0.6
    padding[..., 0] = False
    return {
        "none": {},
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": torch.randn(QUERIES, keys)},
        "bool-3d": {"attn_mask": several},
        "float-3d": {"attn_mask": torch.randn(rows, QUERIES, keys)},
        "padding": {"key_padding_mask": padding},
        "padding-float": {"key_padding_mask": torch.randn(padding.shape)},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
    }[name]


def same(actual: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> None:
    assert actual[0].shape == expected[0].shape
    assert_close(actual[0], expected[0], 1e-5)
    assert (actual[1] is None) == (expected[1] is None)
    if actual[1] is not None and expected[1] is not None:
        assert actual[1].shape == expected[1].shape
        assert_close(actual[1], expected[1], 1e-5)


FLAGS = [False, True]
MASKS = ["none", "bool", "float", "bool-3d", "float-3d", "padding", "padding-float", "both"]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "bias": False},
]


@covered(("mask", "need_weights", "cross", "batch_first", "batched"), MASKS, *[FLAGS] * 4)
def test_attention_is_the_plain_layer_with_the_update_written_in(
    mask: str, need_weights: bool, cross: bool, batch_first: bool, batched: bool
) -> None:
    for split, options in itertools.product(FLAGS, OPTIONS if cross and batch_first else OPTIONS[:2]):  # some are rare
        adapted, plain = attention_pair(split, batch_first=batch_first, **options)
        arguments = tensors(cross, batch_first, batched)
        extra = masks(mask, KEYS if cross else QUERIES, batched) | {"need_weights": need_weights}
        same(adapted(*arguments, **extra), plain(*arguments, **extra))
        extra["average_attn_weights"] = False
        same(adapted(*arguments, **extra), plain(*arguments, **extra))


def test_self_attention_is_one_product_and_the_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, _ = attention_pair(batch_first=True)
    calls: list[str] = []

    def counted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **options: [calls.append(name), function(*args, **options)][1]  # type: ignore[func-returns-value,return-value]

    monkeypatch.setattr(adapted.delta, "add", counted("linear", adapted.delta.add))  # type: ignore[union-attr,arg-type]
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted("fused", fused))
    x = torch.randn(BATCH, QUERIES, EMBED)
    adapted(x, x, x, need_weights=False)
    assert calls == ["linear", "fused"]


def test_equal_tensors_and_causal_masks() -> None:
    adapted, plain = attention_pair(batch_first=True)
    query, key, value = tensors(True, True, True)
    for arguments in ((query, key, key), (query, query, query.clone()), (key, key.clone(), value)):
        same(adapted(*arguments), plain(*arguments))
    causal = nn.Transformer.generate_square_subsequent_mask(QUERIES)
    for need_weights in FLAGS:
        extra = {"attn_mask": causal, "is_causal": True, "need_weights": need_weights}
        same(adapted(query, query, query, **extra), plain(query, query, query, **extra))


X = torch.ones(2, 5, EMBED)


@in_one_item(
    ("inputs", "options"),
    [
        ([X, X, X], {"is_causal": True}),  # without a mask
        ([X, *[torch.ones(4, 3, EMBED)] * 2], {}),  # another batch of keys
        ([X, X, torch.ones(2, 4, EMBED)], {}),  # another length of values
        ([X, X, X], {"attn_mask": torch.zeros(4, 4)}),
        ([X, X, X], {"attn_mask": torch.zeros(7, 5, 5)}),  # too many heads
        ([torch.ones(2, 5, EMBED + 1)] * 3, {}),
        ([torch.ones(2, 2, 5, EMBED)] * 3, {}),
    ],
)
def test_what_the_plain_layer_refuses_is_refused(inputs: list[Tensor], options: dict[str, Any]) -> None:
    for module in attention_pair(batch_first=True):
        with pytest.raises((RuntimeError, AssertionError, ValueError)):
            module(*inputs, **options, need_weights=False)


def test_dropout_of_attention_acts_in_training_only() -> None:
    adapted, plain = attention_pair(batch_first=True, dropout=0.5)
    x = torch.randn(BATCH, QUERIES, EMBED)
    for need_weights in (False, True):
        assert not torch.equal(
            adapted.train()(x, x, x, need_weights=need_weights)[0], adapted(x, x, x, need_weights=need_weights)[0]
        )
        same(adapted.eval()(x, x, x, need_weights=need_weights), plain.eval()(x, x, x, need_weights=need_weights))


# Transformer encoders and their fused inference


def encoder(nested: bool) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(EMBED, 2, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)


def padding() -> Tensor:
    lengths = torch.tensor([5, 3, 1, 4])
    return torch.arange(5)[None] >= lengths[:, None]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of the plain twin
@covered(
    ("targets", "padded", "nested"), [None, ["qkv"], ["fc1"], ["fc2"], ["o"], ["all"], [r"layers\.1\..*"]], FLAGS, FLAGS
)
def test_an_encoder_in_eval_uses_its_adapter(targets: list[str] | None, padded: bool, nested: bool) -> None:
    plain = encoder(nested).eval()
    adapted = copy.deepcopy(plain)
    inject(adapted, RandLoRA(rank=5), targets)
    randomise(adapted)
    twin = by_hand(adapted, plain)
    x = torch.randn(4, 5, EMBED)
    extra = {"src_key_padding_mask": padding()} if padded else {}
    valid = ~padding() if padded else torch.ones(4, 5, dtype=torch.bool)
    for model in (adapted, adapted.layers[1]):  # type: ignore[index]
        other = twin if model is adapted else twin.layers[1]  # type: ignore[index]
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert_close(model(x, **extra)[valid], other(x, **extra)[valid], 2e-5)  # type: ignore[operator]
    with torch.no_grad():
        assert (adapted(x, **extra) - plain(x, **extra))[valid].abs().max() > 1e-3
        with disabled(adapted):
            assert_close(adapted(x, **extra)[valid], plain(x, **extra)[valid], 2e-5)
        merge(adapted)
        assert_close(adapted(x, **extra)[valid], twin(x, **extra)[valid], 2e-5)
        unmerge(adapted)
        assert_close(adapted(x, **extra)[valid], twin(x, **extra)[valid], 2e-5)


def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts uses of PyTorch's fused encoder layer from now on."""
    calls: list[int] = []
    fused = torch._transformer_encoder_layer_fwd

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return fused(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    return calls


@pytest.mark.parametrize("nested", [False, True])
def test_unloading_gives_the_fused_inference_back(nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder(nested).eval()
    before = [dict(vars(module)) for module in model.modules()]
    inject(model, LoRA(rank=2), ["fc1"])
    randomise(model)
    x = torch.randn(4, 5, EMBED)
    calls = fused_calls(monkeypatch)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding())
        assert not calls
        merge_and_unload(model)
        assert_close(model(x, src_key_padding_mask=padding())[~padding()], expected[~padding()])
        assert len(calls) == 2
    for module, attributes in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys()
        for name in ("use_nested_tensor", "activation_relu_or_gelu"):
            assert getattr(module, name, None) == attributes.get(name)


def test_layers_without_adapter_keep_their_fused_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder(False).eval()
    inject(model, LoRA(rank=2), [r"layers\.0\.linear1"])
    calls = fused_calls(monkeypatch)
    with torch.no_grad():
        model(torch.randn(4, 5, EMBED))
    assert len(calls) == 1


def test_nested_tensors_are_never_silently_passed_by() -> None:
    model = encoder(True).eval()
    inject(model, LoRA(rank=2), ["qkv"])
    x = torch.nested.nested_tensor([torch.randn(3, EMBED), torch.randn(5, EMBED)])
    with torch.no_grad(), pytest.raises((RuntimeError, AssertionError)):
        model.layers[0](x)  # type: ignore[operator]


# What stays of a layer


def test_a_layer_stays_the_same_object_with_hooks_and_attributes() -> None:
    layer = nn.Linear(12, 20)
    layer.note = "mine"  # type: ignore[assignment]
    seen: list[int] = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    model = nn.Sequential(layer)
    weight = layer.weight
    inject(model, LoRA(rank=2), ["0"])
    model(torch.randn(2, 12))
    assert model[0] is layer
    assert layer.weight is weight
    assert isinstance(layer, AdaptedLinear)
    assert (seen, layer.note) == ([1], "mine")
    merge_and_unload(model)
    assert type(layer) is nn.Linear
    assert (layer.weight, layer.note) == (weight, "mine")


def test_a_shared_layer_is_adapted_once_and_everywhere() -> None:
    shared = nn.Linear(12, 12)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    report = inject(model, LoRA(rank=2), ["0"])
    randomise(model)
    assert len(report.rows) == 1
    x = torch.randn(3, 12)
    weight = shared.weight + delta_weights(model)["0"]
    first = torch.tanh(x @ weight.T + shared.bias)
    assert_close(model(x), first @ weight.T + shared.bias)


@pytest.mark.parametrize("inference", [False, True])
def test_training_goes_on_after_a_merge_in_an_evaluation(inference: bool) -> None:
    model = nn.Sequential(nn.Linear(12, 20))
    inject(model, LoRA(rank=2, alpha=2.0), ["0"])
    randomise(model)
    before = model[0].weight.clone()
    with torch.inference_mode(inference):
        merge(model)
        model(torch.randn(2, 12))
        unmerge(model)
    assert torch.equal(model[0].weight, before)
    with torch.inference_mode(inference):
        merge(model)
    unmerge(model)
    model(torch.randn(2, 12)).sum().backward()
    assert torch.equal(model[0].weight, before)
    assert model[0].delta.A.grad.any()  # type: ignore[union-attr]


def test_a_merged_model_moves_copies_and_converts() -> None:
    model = nn.Sequential(nn.Linear(12, 20))
    inject(model, LoRA(rank=2, alpha=2.0), ["0"])
    randomise(model)
    before = model[0].weight.clone()
    merge(model)
    assert "0.frozen_weight" not in model.state_dict()
    for twin in (copy.deepcopy(model), copy.deepcopy(model).double().float()):
        unmerge(twin)
        assert torch.equal(twin[0].weight, before)
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("what", ["base", "update"])
def test_loading_a_state_into_a_merged_model_unmerges_it(what: str) -> None:
    model = nn.Sequential(nn.Linear(12, 20))
    inject(model, LoRA(rank=2, alpha=2.0), ["0"])
    randomise(model)
    twin = copy.deepcopy(model)
    if what == "base":
        state = nn.Sequential(nn.Linear(12, 20)).state_dict()
    else:
        state = {name: torch.randn_like(value) for name, value in model.state_dict().items() if "delta" in name}
    merge(model)
    for one in (model, twin):
        one.load_state_dict(state, strict=False)
    x = torch.randn(3, 12)
    assert torch.equal(model(x), twin(x))
    unmerge(model)
    assert torch.equal(model(x), twin(x))
