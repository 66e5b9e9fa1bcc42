"""SVFT: its patterns, singular vectors and files; the formula is tested by the contract."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from randlora_pl.adapters import SVFT, inject
from randlora_pl.adapters.methods.singular import SVFTDelta
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.adapters.select import match_budget
from randlora_pl.utils.errors import UserError
from tests.adapters import cases
from tests.adapters.cases import KINDS, One, adapted_one, assert_close, randomise
from tests.adapters.contract import CHECKS
from tests.adapters.layers.test_quantized import pair
from tests.support.products import in_one_item


def adapted(pattern: Any, k: int, out_features: int = 12, in_features: int = 12, **options: Any) -> tuple[One, Any]:
    torch.manual_seed(0)
    return adapted_one(SVFT(pattern=pattern, off_diagonals=k, **options), in_features, out_features, torch.float64)


PATTERNS = [
    *itertools.product(("plain", "banded", "random"), (0, 3), ((12, 20), (20, 12))),
    *itertools.product(("banded", "top_k"), (0, 4, 11), ((12, 12),)),
]


@in_one_item(("pattern", "k", "sides"), PATTERNS)
def test_m_trains_at_its_places_and_is_zero_elsewhere(pattern: str, k: int, sides: tuple[int, int]) -> None:
    model, delta = adapted(pattern, k, *sides)
    before = model.fc.weight.clone()
    assert torch.equal(delta.effective_weight(before), before), "the released code starts elsewhere"
    k = 0 if pattern == "plain" else k
    places = delta.places.tolist()
    banded = [12 * p + q for p in range(12) for q in range(12) if abs(p - q) <= k]
    assert len(places) == len(set(places)) == len(banded) == 12 * (2 * k + 1) - k * (k + 1)
    assert (places == banded) == (pattern in ("plain", "banded") or len(banded) == 144)
    randomise(model)
    u, s, _ = torch.linalg.svd(before, full_matrices=False)
    assert_close(u * (u * delta.U).sum(0).sign(), delta.U, 1e-6)
    expected = torch.zeros(144).double()
    expected[places] = delta.values.detach()
    assert_close(delta.U.T @ delta.change(torch.empty(0)) @ delta.V.T, expected.view(12, 12), 1e-6)
    if pattern == "plain":  # the singular vectors stay
        assert_close(delta.effective_weight(before), delta.U @ torch.diag(s + delta.values) @ delta.V, 1e-10)


def test_top_k_compares_left_with_right_vectors() -> None:
    """The released code ranks the entries of U V, whose rows are not singular vectors."""
    _, delta = adapted("top_k", 1)
    alike = {12 * p + q: abs(float(delta.U[:, p] @ delta.V[q])) for p in range(12) for q in range(12)}
    most = sorted(alike, key=lambda place: -alike[place])[: len(delta.places)]
    assert delta.places.tolist() == sorted(most)
    wrong = (delta.U @ delta.V).flatten().argsort(descending=True)[: len(most)]
    assert delta.places.tolist() != wrong.sort()[0].tolist()


@in_one_item("kind", ["linear-square", "mha-split", "mha-out_proj"])
def test_top_k_fulfils_the_contract_on_square_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.METHODS, "svft-top_k", lambda r, qkv: SVFT(pattern="top_k", off_diagonals=2, qkv=qkv))
    for check in CHECKS["svft"]:
        torch.manual_seed(0)
        check("svft-top_k", kind)


def test_split_queries_keys_and_values_have_singular_vectors_of_their_own() -> None:
    kind = KINDS["mha-split"]
    model = kind.build()
    inject(model, SVFT(qkv="split"), kind.targets)
    updates = [each for each in model.modules() if isinstance(each, SVFTDelta)]
    rows = model.get_parameter("attn.in_proj_weight").chunk(3)
    for delta, part in zip(updates, rows, strict=True):
        assert_close(delta.U.T @ part @ delta.V.T, torch.diag(torch.linalg.svdvals(part)), 1e-5)  # type: ignore[operator]


def test_budgets_and_errors() -> None:
    square, wide = WeightShape("attn.q", 12, 12), WeightShape("mlp.c_fc", 48, 12)
    chosen, _ = match_budget(SVFT(match="lora:2"), [square, wide], nn.Linear(2, 2))
    assert isinstance(chosen, SVFT) and chosen.off_diagonals == 4  # 88 each, LoRA has 48 and 120
    with pytest.raises(UserError, match="no off_diagonals of SVFT comes near"):
        match_budget(SVFT(pattern="plain", match="lora:2"), [square, wide], nn.Linear(2, 2))
    _, quantized = pair()
    with pytest.raises(UserError, match=r"but fc is quantized. .* LoRAXS or RandLoRA"):
        inject(quantized, SVFT(), ["fc"])
    assert type(quantized.fc).__name__ == "Eighths"
