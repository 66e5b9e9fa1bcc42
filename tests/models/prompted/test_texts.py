"""Rows and features of texts with learned tokens, against rows token by token and hooks on the unchanged tower."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_pl.adapters import LoRA, inject, set_train_mode
from randlora_pl.models import encode_prompts, load_clip, set_gradient_checkpointing
from randlora_pl.models import text as texts_module
from randlora_pl.models.text import (
    TextRows,
    encode_rows,
    text_features,
    text_tower,
    token_embeddings,
)
from randlora_pl.prompts import CoOp, Fixed
from tests.prompts import reference
from tests.support.products import covered, in_one_item

WORDS = "a photo of a"  # four tokens
NAMES = ["zebra", "cat", "a very old dog", "ox"]


def tiny() -> tuple[Any, Any]:
    clip = load_clip("tiny")
    return clip.model.requires_grad_(False).eval(), clip.tokenizer


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.02 * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()


def rows_of(tokenizer: Any, names: Sequence[str] = NAMES, chunk_tokens: int = 4096, **options: Any) -> TextRows:
    prompts = CoOp(length=4, words=WORDS, **options).build(load_clip("tiny").model, tokenizer, names, 0)
    return prompts.rows(names, chunk_tokens)


def gradients(features: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    upper = torch.randn(features.shape, generator=torch.Generator().manual_seed(9)).to(features.dtype)
    return torch.autograd.grad((F.normalize(features, dim=1) * upper).sum(), tensors, retain_graph=True)


def test_words_alone_are_the_models_own_texts() -> None:
    model, tokenizer = tiny()
    tower, own = text_tower(model), tokenizer([f"a photo of a {name}." for name in NAMES])
    whole = text_features(tower, own, torch.full_like(own, -1), own.argmax(1))
    assert torch.equal(whole, model.encode_text(own))
    other = own.clone()
    for row, end in zip(other, own.argmax(1), strict=True):
        row[end + 1 :] = 77
    behind = text_features(tower, other, torch.full_like(own, -1), own.argmax(1))
    assert torch.equal(whole, behind)
    expected = encode_prompts(model, tokenizer, NAMES, ["a photo of a {}."], "cpu")
    for chunk_tokens in (1, 20, 4096):
        rows = Fixed(template="a photo of a {}.").build(model, tokenizer, NAMES, 0).rows(NAMES, chunk_tokens)
        assert rows.ids.shape[1] < 16 and len(rows.chunks) == {1: 4, 20: 3, 4096: 1}[chunk_tokens]
        torch.testing.assert_close(F.normalize(encode_rows(tower, rows), dim=1), expected, rtol=0, atol=1e-6)


@covered(("position", "specific"), ["end", "middle", "front"], [False, True], strength=1)
def test_features_and_gradients_equal_those_of_texts_built_token_by_token(position: Any, specific: bool) -> None:
    model, tokenizer = tiny()
    context = drawn(4, 4, 128) if specific else drawn(4, 128)
    deep = [drawn(4, 128, seed=1), drawn(4, 128, seed=2)]
    rows = rows_of(tokenizer, chunk_tokens=20, position=position)
    assert len(rows.chunks) > 1
    slow_rows = [reference.row(tokenizer, name, WORDS, 4, position) for name in NAMES]
    fast, slow = (
        encode_rows(text_tower(model), rows, context, deep),
        reference.text_features(model, slow_rows, context, deep),
    )
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)
    for own, other in zip(gradients(fast, context, *deep), gradients(slow, context, *deep), strict=True):
        assert own.abs().max() > 0
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_chunks_and_order_change_nothing() -> None:
    model, tokenizer = tiny()
    tower, context, deep = text_tower(model), drawn(4, 128), [drawn(4, 128, seed=1)]
    names = [f"{first} {second}" for first in ("old", "a very wet", "dry") for second in ("cat", "zebra", "dog")]
    whole = encode_rows(tower, rows_of(tokenizer, names), context, deep)
    expected = gradients(whole, context, *deep)
    for chunk_tokens in (1, 12, 30, 61):
        rows = rows_of(tokenizer, names, chunk_tokens)
        assert len(rows.chunks) > 1 and sum(stop - start for start, stop, _ in rows.chunks) == len(rows) == 9
        parts = encode_rows(tower, rows, context, deep)
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
        for own, other in zip(gradients(parts, context, *deep), expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    backwards = encode_rows(tower, rows_of(tokenizer, names[::-1], 30), context, deep)
    torch.testing.assert_close(backwards.flip(0), whole, rtol=0, atol=1e-5)


def test_hundreds_of_gradients_add_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{first}{second} {third}" for first in "abcdefghij" for second in "abcdefghij" for third in "klmn"]

    def found(bfloat16: bool) -> tuple[Tensor, ...]:
        model, tokenizer = tiny()
        context, deep = drawn(4, 128), drawn(4, 128, seed=1)
        if bfloat16:  # as frozen_dtype does
            for block in model.transformer.resblocks:
                block.mlp.to(torch.bfloat16), block.attn.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            features = encode_rows(text_tower(model), rows_of(tokenizer, names), context, [deep])
        upper = torch.randn(128, generator=torch.Generator().manual_seed(9))
        loss = (F.normalize(features.float(), dim=1) @ upper).sum()
        return torch.autograd.grad(loss, (context, deep))

    exact, rounded = found(False), found(True)
    errors = [float((own - other).norm() / own.norm()) for own, other in zip(exact, rounded, strict=True)]
    assert max(errors) < 0.02
    monkeypatch.setattr(texts_module, "token_embeddings", _cast_first)
    assert float((exact[0] - found(True)[0]).norm() / exact[0].norm()) > 0.02


def _cast_first(tower: Any, ids: Tensor, slots: Tensor, context: Tensor) -> Tensor:
    return token_embeddings(tower, ids, slots, context.bfloat16())


@in_one_item("blockwise", [False, True])
def test_what_is_computed_again_draws_the_same_dropout(blockwise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny()
    inject(model, LoRA(rank=2, alpha=8, dropout=0.5, seed=0), [r"transformer\..*c_fc"])
    set_train_mode(model, True)
    for name, parameter in model.named_parameters():
        if name.endswith("B"):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    named = model.named_parameters()
    trained = [value for name, value in named if value.requires_grad and not name.startswith("visual.")]
    if blockwise:
        set_gradient_checkpointing(model, True)
    calls: list[int] = []
    model.transformer.resblocks[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def found() -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        context = drawn(4, 128)
        features = encode_rows(text_tower(model), rows_of(tokenizer, chunk_tokens=20), context)
        return (features.detach(), *gradients(features, context, *trained))

    first, again = found(), found()
    assert len(trained) > 1 and len(calls) == 2 * 2 * 3  # three chunks
    monkeypatch.setattr(texts_module, "checkpoint", lambda run, *inputs, use_reentrant: run(*inputs))
    set_gradient_checkpointing(model, False)
    kept = found()
    assert len(calls) == 2 * 2 * 3 + 3
    for one, other, direct in zip(first, again, kept, strict=True):
        assert torch.equal(one, other) and torch.equal(one, direct)
