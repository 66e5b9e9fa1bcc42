"""Checkpoints of the official vision code, made from the description of their format; updates by the formula."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from randlora_pl.adapters import delta_weights, load_adapter, save_adapter
from randlora_pl.interop.external import import_official
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import assert_close
from tests.adapters.zoo import small_clip, small_vit
from tests.support.products import in_one_item

CLIP = {  # out x in of the weights of both towers
    **{f"visual.transformer.resblocks.{i}.attn.": (96, 32) for i in (0, 1)},
    **{f"visual.transformer.resblocks.{i}.mlp.c_fc.": (128, 32) for i in (0, 1)},
    **{f"visual.transformer.resblocks.{i}.mlp.c_proj.": (32, 128) for i in (0, 1)},
    **{f"transformer.resblocks.{i}.mlp.c_fc.": (64, 16) for i in (0, 1)},
}
VIT = {f"blocks.{i}.{layer}.": size for i in (0, 1) for layer, size in (("attn.qkv", (72, 24)), ("mlp.fc2", (24, 96)))}


def checkpoint(weights: dict[str, tuple[int, int]], rank: int, prefix: str = "") -> dict[str, Any]:
    """n = d // r + 1 rows of lambda and gamma for each weight, and one pair of bases with room for more."""
    small, large = max(min(size) for size in weights.values()), max(max(size) for size in weights.values())
    state: dict[str, Any] = {"seed": 8539, "basis": (torch.randn(50, large, rank), torch.randn(1, rank, small))}
    for name, size in weights.items():
        count = min(size) // rank + 1
        state[f"{prefix}{name}w_loramat_B"] = 0.3 * torch.randn(count, rank)
        state[f"{prefix}{name}w_loramat_A"] = 0.3 * torch.randn(count, min(size))
    return state


def by_hand(state: dict[str, Any], name: str, out_features: int, in_features: int, rank: int) -> Tensor:
    """1/r times the sum over p of column (p // r, p % r) of B and row (p // n, p % n) of the scaled A."""
    b, a = state["basis"]
    lam, gam = state[f"{name}w_loramat_B"].T, state[f"{name}w_loramat_A"]  # (r, n), (n, d)
    large, small, count = max(out_features, in_features), min(out_features, in_features), len(gam)
    update = torch.zeros(large, small)
    for p in range(count * rank):
        row = lam[p // count, p % count] * a[0, p // count, :small] * gam[p % count]
        update += b[p // rank, :large, p % rank][:, None] * row
    return (update if out_features >= in_features else update.T) / rank


@pytest.mark.parametrize("rank", [4, 5])  # 4 divides every side, so there is one basis more than in PEFT
@pytest.mark.parametrize(("build", "weights"), [(small_clip, CLIP), (small_vit, VIT)])
def test_updates(build: Any, weights: dict[str, tuple[int, int]], rank: int, tmp_path: Path) -> None:
    state = checkpoint(weights, rank)
    torch.save(state, tmp_path / "official.pt")
    base = build()
    model = import_official(tmp_path / "official.pt", copy.deepcopy(base))
    updates = delta_weights(model)
    assert len(updates) == len(weights)
    for name, size in weights.items():
        layer = name.removesuffix(".") + (".in_proj" if name.endswith("attn.") else "")
        assert_close(updates[layer], by_hand(state, name, *size, rank), 1e-5)
    save_adapter(model, tmp_path / "ours")
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "ours")
    for name, update in delta_weights(again).items():
        assert torch.equal(update, updates[name])


@pytest.mark.parametrize("prefix", ["model.", "module.image_encoder.model.", "image_encoder_model_"])
@in_one_item("style", ["dots", "underscores", "in_proj", "wrapped"])
def test_names_with_what_wraps_the_model(prefix: str, style: str, tmp_path: Path) -> None:
    state = checkpoint(CLIP, 4)
    renamed = {}
    for name, value in state.items():
        if "loramat" in name:
            owner, _, last = name.rpartition(".")
            owner = owner.replace(".", "_") if style == "underscores" else owner
            last = f"in_proj_{last}" if style == "in_proj" and owner.endswith("attn") else last
            name = f"{prefix}{owner}{'_' if style == 'underscores' else '.'}{last}"
        renamed[name] = value
    whole = {"state_dict": renamed} if style == "wrapped" else renamed
    torch.save(whole, tmp_path / "official.pt")
    updates = delta_weights(import_official(tmp_path / "official.pt", small_clip()))
    for name, size in CLIP.items():
        layer = name.removesuffix(".") + (".in_proj" if name.endswith("attn.") else "")
        assert_close(updates[layer], by_hand(state, name, *size, 4), 1e-5)


def test_alpha(tmp_path: Path) -> None:
    torch.save(checkpoint(VIT, 4), tmp_path / "official.pt")
    one, ten = (delta_weights(import_official(tmp_path / "official.pt", small_vit(), alpha=a)) for a in (1.0, 10.0))
    assert all(torch.allclose(10 * one[name], ten[name], rtol=1e-5, atol=1e-6) for name in one)
    torch.save({**checkpoint(VIT, 4), 7: "x", "seed": "x"}, tmp_path / "official.pt")
    assert delta_weights(import_official(tmp_path / "official.pt", small_vit())), "odd names and seeds do no harm"


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "official.pt"

    def refused(state: Any, message: str) -> None:
        torch.save(state, file)
        model = small_vit()
        names = set(model.state_dict())
        with pytest.raises(UserError, match=message):
            import_official(file, model)
        assert set(model.state_dict()) == names

    with pytest.raises(UserError, match="is not a file"):
        import_official(tmp_path / "nothing", small_vit())
    refused({"weight": torch.zeros(2)}, "is not a checkpoint of the official RandLoRA code")
    refused(torch.zeros(2), "holds a Tensor, not the state of a model")
    refused(small_vit(), "could run code")
    refused(checkpoint(CLIP, 4), "its target .* does not exist in this model")
    name = "blocks.0.mlp.fc2."
    state = checkpoint(VIT, 4)
    refused({key: value for key, value in state.items() if key != f"{name}w_loramat_A"}, "w_loramat_A is missing")
    refused(state | {f"{name}w_loramat_A": torch.zeros(3, 24)}, r"gammas of blocks.0.mlp.fc2 has shape \(3, 24\)")
    refused(state | {f"{name}w_loramat_B": torch.zeros(7, 3)}, r"have ranks \[3, 4\]")
    refused(state | {"basis": (torch.zeros(50, 20, 4), torch.zeros(1, 4, 24))}, r"its bases A .* are too small")
    refused({key: value for key, value in state.items() if key != "basis"}, "it needs .* and basis")
    for content in (file.read_bytes()[:-50], b"", b"hello world" * 10, b"PK\x03\x04aaaa", b"\x80\x02}q\x00."):
        file.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            import_official(file, small_vit())


@in_one_item(
    ("change", "message"),
    [
        ({"lambda": 3}, r"w_loramat_B is not a matrix of numbers"),
        ({"lambda": torch.zeros(3)}, r"w_loramat_B is not a matrix of numbers"),
        ({"gamma": None}, r"w_loramat_A is not a matrix of numbers"),
        ({"basis": ("a", "b")}, "its basis is not a pair"),
        ({"basis": (None, None)}, "its basis is not a pair"),
        ({(1, 2): 3, "basis": None}, "is not a checkpoint of the official RandLoRA code"),
    ],
)
def test_entries_that_are_no_tensors(change: dict[Any, Any], message: str, tmp_path: Path) -> None:
    state: dict[Any, Any] = checkpoint(VIT, 4)
    places = {"lambda": "w_loramat_B", "gamma": "w_loramat_A"}
    for key, value in change.items():
        state[next((name for name in state if key in places and name.endswith(places[key])), key)] = value
    torch.save(state, tmp_path / "official.pt")
    with pytest.raises(UserError, match=message):
        import_official(tmp_path / "official.pt", small_vit())
