"""Losses of the next tokens: against padding on the left with a mask and all logits at once."""

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from randlora_pl.adapters import LoRA, inject, trainable_parameters
from randlora_pl.language import decoder as module
from randlora_pl.language.batches import Tokens
from randlora_pl.language.decoder import learned_positions, token_losses
from randlora_pl.language.tokenization import IGNORED, Encoded, collate
from tests.adapters.cases import assert_close, randomise
from tests.support.products import covered, in_two_items, marked

from .test_generate import LAYERS, small

ROWS = [Encoded(list(range(3, 3 + length)), [], length) for length in (13, 2, 7)]
ROWS = [Encoded(row.input_ids, [*[IGNORED] * (length // 3 + 1), *row.input_ids[length // 3 + 1 :]], length)
        for row, length in zip(ROWS, (13, 2, 7), strict=True)]  # fmt: skip


def old_way(model: Any, rows: list[Encoded], smoothing: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
    """Losses of the learned tokens of each sample, and whether they are right."""
    batch = collate(rows, 0, "left")
    mask, labels = batch["attention_mask"], batch["labels"][:, 1:]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask, "position_ids": positions}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.mT, labels, reduction="none", label_smoothing=smoothing)
    right, counted = logits.argmax(-1) == labels, labels != IGNORED
    return [each[mine] for each, mine in zip(losses, counted, strict=True)], [
        each[mine] for each, mine in zip(right, counted, strict=True)
    ]


def new_way(model: Any, rows: list[Encoded], smoothing: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
    losses, right, counted = token_losses(model, Tokens(rows, 0).batch(range(len(rows))), smoothing)
    assert not losses[~counted].any()
    found = zip(losses, right, counted, strict=True)
    return tuple(zip(*((one[mine], two[mine]) for one, two, mine in found), strict=True))  # type: ignore[return-value]


def adapted(kind: str, head: bool = False, **shape: Any) -> Any:
    """A decoder whose last linear layer but the head is adapted, on request with its head."""
    model = small(kind, **{"pad_token_id": 0, "eos_token_id": 1, **shape})
    layers = [name for name, layer in model.named_modules() if type(layer) is torch.nn.Linear]
    own = [name for name in layers if name.startswith(model.base_model_prefix)]
    if own:
        inject(model, LoRA(rank=4, alpha=4.0), [own[-1].replace(".", r"\."), *(["lm_head"] if head else [])])
    randomise(model)
    return model


def gradients(model: Any, losses: list[Tensor]) -> list[Tensor]:
    """Of a sum in which every token has a weight of its own, as samples have."""
    weights = torch.rand(sum(map(len, losses)), generator=torch.Generator().manual_seed(1))
    values = list(trainable_parameters(model).values()) or list(model.parameters())
    return [
        g for g in torch.autograd.grad((torch.cat(losses) * weights).sum(), values, allow_unused=True) if g is not None
    ]


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in ("qwen2", "llama", "phi3", "opt", "bloom")},
    "learned positions": ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 4}),
    "a table that ends within the padding": ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 14}),
    "scaled logits": ("cohere", {}),
    "divided logits": ("granite", {"logits_scaling": 4.0}),
    "bounded logits": ("gemma2", {"sliding_window": 4, "head_dim": 8, "final_logit_softcapping": 2.0}),
    "angles by length": (
        "phi3",
        {
            "max_position_embeddings": 14,
            "original_max_position_embeddings": 13,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
                "original_max_position_embeddings": 13,
            },
        },
    ),
    "reads ahead": ("xlnet", {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 32}),
    **LAYERS,
}  # fmt: skip


@in_two_items("name", marked(zip(FAMILIES), lambda row: row[0] not in ("qwen2", "phi3", "opt")))
def test_padding_on_the_right_without_a_mask_gives_the_same(name: str) -> None:
    kind, shape = FAMILIES[name]
    model = adapted(kind, **shape)
    (old, old_right), (new, new_right) = old_way(model, ROWS, 0.1), new_way(model, ROWS, 0.1)
    for one, other, old_one, other_one in zip(old, new, old_right, new_right, strict=True):
        assert len(one) and torch.equal(old_one, other_one)
        assert_close(other, one, 1e-5)
    for one, other in zip(gradients(model, old), gradients(model, new), strict=True):
        assert_close(other, one, 1e-4)
    for row, found in zip(ROWS, new_way(model, ROWS)[0], strict=True):
        if "angles" not in name:  # of short texts, which follow the longest of a batch
            assert_close(found, old_way(model, [row])[0][0], 1e-4)


@covered(("kind", "smoothing", "trains"), ["llama", "gemma2", "granite"], [0.0, 0.1], [False, True])
def test_parts_give_the_same_as_all_logits_at_once(kind: str, smoothing: float, trains: bool) -> None:
    model = adapted(kind, trains, head_dim=8, tie_word_embeddings=False)
    plain, right = new_way(model, ROWS, smoothing)
    expected = gradients(model, plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LOGITS", 0)
        patch.setattr(module, "_TOKENS", 5)
        patch.setattr(module, "_ROWS", 2)
        calls: list[int] = []
        hook = model.lm_head.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[-2]))
        found, correct = new_way(model, ROWS, smoothing)
        again = gradients(model, found)
        hook.remove()
        with torch.no_grad():
            evaluated = new_way(model, ROWS, smoothing)
    learned = sum(map(len, plain))
    sizes = [5] * (learned // 5) + ([learned % 5] if learned % 5 else [])
    assert calls == [1, *sizes, *(reversed(sizes) if trains else ())]  # nothing is computed twice beneath a frozen head
    for got in ((found, correct), evaluated):
        assert torch.equal(torch.cat(got[1]), torch.cat(right))
        assert_close(torch.cat(got[0]), torch.cat(plain), 1e-5)
    assert all(again[place].abs().sum() > 0 for place in range(len(again)))
    for one, other in zip(expected, again, strict=True):
        assert_close(other, one, 1e-4)


class Live(TorchDispatchMode):
    """The most bytes that tensors made under it hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), False)
        result = func(*args, **(kwargs or {}))
        self._note(result, True)
        self.most = max(self.most, self.now)
        return result

    def _note(self, tensors: Any, new: bool) -> None:
        for tensor in torch.utils._pytree.tree_leaves(tensors):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._known:
                size = new * tensor.untyped_storage().nbytes()
                self._known.add(key)
                self.now += size
                weakref.finalize(tensor.untyped_storage(), self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def test_the_logits_of_llama_take_a_third_of_a_gigabyte() -> None:
    """16 texts of 256 tokens over 128,256 words; all at once take 9 GB."""
    shape = {"hidden_size": 4096, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 128256}
    most = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape), dtype=torch.bfloat16)
        states = torch.zeros(16 * 256, 4096, requires_grad=True)
        labels = torch.zeros(16 * 256, dtype=torch.int64)
        for limit in (2**60, 2**26):
            model.requires_grad_(False)
            with pytest.MonkeyPatch.context() as patch, Live() as live, torch.autocast("cpu", torch.bfloat16):
                patch.setattr(module, "_LOGITS", limit)
                module._losses(model, states, labels, lambda part: model.lm_head(part[None]).flatten(0, 1), 0.0)[
                    0
                ].sum().backward()
            most[limit] = live.most / 1e9
            states.grad = None
    gradients = 16 * 256 * 4096 * 4 / 1e9
    assert most[2**26] - gradients < 0.3 and most[2**60] > 6, most


def test_only_tokens_before_a_label_are_looked_at() -> None:
    labels = torch.tensor([[-100, -100, 4, 5], [7, -100, -100, 8]])
    assert learned_positions(labels).tolist() == [1, 2, 6]
    assert learned_positions(torch.full((2, 5), IGNORED)).tolist() == []
    model = adapted("llama")
    losses, right, counted = token_losses(
        model, {**collate([Encoded([3, 4], [IGNORED] * 2, 2)], 0), "padding": "right"}
    )
    assert losses.shape == right.shape == counted.shape == (1, 7) and not losses.any() and not counted.any()
