"""SVFT: its patterns, singular vectors and files; the formula is tested by the contract."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from randlora_pl.adapters import SVFT, delta_weights, derived, inject, load_adapter, read_adapter, save_adapter
from randlora_pl.adapters.methods.svft import SVFTDelta
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.adapters.select import match_budget
from randlora_pl.utils.errors import UserError
from tests.adapters import cases
from tests.adapters.cases import KINDS, One, assert_close, inputs, randomise
from tests.adapters.contract import CHECKS
from tests.adapters.layers.test_quantized import pair
from tests.support.products import in_one_item


def adapted(pattern: Any, k: int, out_features: int = 12, in_features: int = 12, **options: Any) -> tuple[One, Any]:
    torch.manual_seed(0)
    model = One(in_features, out_features).double()
    inject(model, SVFT(pattern=pattern, off_diagonals=k, **options), ["fc"])
    assert isinstance(model.fc.delta, SVFTDelta)
    return model, model.fc.delta


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
    signs = (u * delta.U).sum(0).sign()
    assert_close(u * signs, delta.U, 1e-6)
    expected = torch.zeros(144).double()
    expected[places] = delta.values.detach()
    assert_close(delta.U.T @ delta.change(torch.empty(0)) @ delta.V.T, expected.view(12, 12), 1e-6)
    g = torch.randn(sides).double()
    (gradient,) = torch.autograd.grad(delta.change(torch.empty(0)), delta.values, g)
    assert_close(gradient, (delta.U.T @ g @ delta.V.T).flatten()[places], 1e-10)
    if pattern == "plain":  # the singular vectors stay
        assert_close(delta.effective_weight(before), delta.U @ torch.diag(s + delta.values) @ delta.V, 1e-10)


def test_all_diagonals_reach_any_update() -> None:
    model, delta = adapted("banded", 11)
    target = torch.randn(12, 12).double()
    delta.values.data.copy_((delta.U.T @ target @ delta.V.T).flatten())
    assert_close(delta_weights(model)["fc"], target, 1e-6)


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


def test_files_contain_the_values_and_a_sketch(tmp_path: Path) -> None:
    for pattern, kept in (("banded", []), ("random", []), ("top_k", ["fc.delta.places"])):
        model, delta = adapted(pattern, 2, seed=5)
        randomise(model)
        save_adapter(model, tmp_path / pattern)
        file = read_adapter(tmp_path / pattern)
        assert (set(file.tensors), file.kept) == ({*kept, "fc.delta.values"}, kept)
        again = One(12, 12).double()
        again.load_state_dict({name: model.state_dict()[name] for name in again.state_dict()})
        load_adapter(again, tmp_path / pattern)
        assert torch.equal(again.fc.delta.places, delta.places)  # type: ignore[union-attr]
        x = inputs(model, dtype=torch.float64)
        assert torch.equal(again(x), model(x))


def test_equal_singular_values_are_refused_where_lapack_rotates_them(tmp_path: Path, monkeypatch: Any) -> None:
    def identity() -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8))
        model[0].weight.data = 2 * torch.eye(8)
        nn.init.zeros_(model[0].bias)
        return model

    model = identity()
    inject(model, SVFT(), ["0"])
    randomise(model)
    save_adapter(model, tmp_path / "a")
    load_adapter(identity(), tmp_path / "a")
    turn, whole = torch.linalg.qr(torch.randn(8, 8).double())[0], derived.factors

    def rotated(recipe: Any, matrix: Any, rank: int) -> Any:
        left, values, right = whole(recipe, turn.T @ matrix, rank)
        return derived.canonical(turn @ left, values, right)

    monkeypatch.setattr(derived, "factors", rotated)
    with pytest.raises(UserError, match=r"derived tensors differ .*keep_derived=True"):
        load_adapter(identity(), tmp_path / "a")


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
    with pytest.raises(UserError, match=r"top_k needs square weights, mlp.c_fc is 48 x 12\. Set .* banded or random"):
        SVFT(pattern="top_k").count(wide)
    with pytest.raises(UserError, match=r"12 off-diagonals are too many for attn.q .* at most 11"):
        SVFT(off_diagonals=12).count(square)
    with pytest.raises(UserError, match=r"'thin'. Set plain, banded"):
        SVFT(pattern="thin")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="off_diagonals is -1"):
        SVFT(off_diagonals=-1)
    _, quantized = pair()
    with pytest.raises(UserError, match=r"but fc is quantized. .* LoRAXS or RandLoRA"):
        inject(quantized, SVFT(), ["fc"])
    assert type(quantized.fc).__name__ == "Eighths"
