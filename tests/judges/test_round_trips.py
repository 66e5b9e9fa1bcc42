"""Ours to PEFT to ours, and PEFT to ours to PEFT: the same outputs at every stop, in models of three libraries."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, RandLoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from randlora_pl.adapters import Adapter, DoRA, LoRA, RandLoRA, VeRA, inject, load_adapter, save_adapter
from randlora_pl.interop.peft_export import export_peft
from randlora_pl.interop.peft_import import import_peft
from tests.adapters.cases import assert_close, randomise
from tests.judges.models import MODELS
from tests.support.products import covering

OURS: dict[str, Callable[[], Adapter]] = {
    "randlora": lambda: RandLoRA(rank=5, pairing="peft", seed=3),
    "randlora-alphas": lambda: RandLoRA(rank=5, pairing="peft", alpha={".*(fc1|0.*)": 3.5}),
    "randlora-signs": lambda: RandLoRA(rank=5, pairing="peft", basis="ternary", sparsity=3),
    "lora": lambda: LoRA(rank=3, alpha=2.5),
    "lora-patterns": lambda: LoRA(rank={r".*0\..*": 5, ".*": 3}, alpha={r".*1\..*": 7.0}, rslora=True),
    "dora": lambda: DoRA(LoRA(rank=3, alpha=6)),
    "vera": lambda: VeRA(rank=7, alpha=14.0),
    "vera-patterns": lambda: VeRA(rank={r".*0\..*": 30, ".*": 9}, alpha=9.0),
}
PEFT: dict[str, Callable[[Any], Any]] = {
    "randlora": lambda targets: RandLoraConfig(r=5, randlora_alpha=7, target_modules=targets),
    "seed": lambda targets: RandLoraConfig(r=5, randlora_alpha=7, target_modules=targets, save_projection=False),
    "seed-sparse": lambda targets: RandLoraConfig(
        r=5, randlora_alpha=7, target_modules=targets, save_projection=False, sparse=True, projection_prng_key=4
    ),
    "seed-very-sparse": lambda targets: RandLoraConfig(
        r=5, randlora_alpha=7, target_modules=targets, save_projection=False, very_sparse=True
    ),
    "lora": lambda targets: LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_rslora=True),
    "lora-patterns": lambda targets: LoraConfig(
        r=3, target_modules=targets, rank_pattern={r"0\..*": 4}, alpha_pattern={r"^.*1\..*": 2}
    ),
    "dora": lambda targets: LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=True),
    "vera": lambda targets: VeraConfig(r=7, target_modules=targets),
    "vera-seed": lambda targets: VeraConfig(r=7, target_modules=targets, save_projection=False, projection_prng_key=4),
}


def same(first: nn.Module, second: nn.Module, kind: str) -> None:
    assert_close(MODELS[kind].outputs(second), MODELS[kind].outputs(first), 1e-5)


@pytest.mark.parametrize(("method", "kind"), covering(OURS, MODELS, strength=1))
def test_ours_to_peft_to_ours(method: str, kind: str, tmp_path: Path) -> None:
    base = MODELS[kind].build()
    ours = copy.deepcopy(base)
    inject(ours, OURS[method](), MODELS[kind].ours)
    randomise(ours, 0.5)
    save_adapter(ours, tmp_path / "ours")
    done = export_peft(tmp_path / "ours", tmp_path / "peft", model=base)
    assert done.difference is not None
    assert done.difference.gap < 1e-5
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft")
    same(ours, theirs.get_base_model(), kind)
    changed = (MODELS[kind].outputs(base) - MODELS[kind].outputs(ours)).abs().max()
    assert changed > 0.05
    back = import_peft(tmp_path / "peft", copy.deepcopy(base))
    same(ours, back, kind)
    save_adapter(back, tmp_path / "back")
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path / "back")
    assert torch.equal(MODELS[kind].outputs(back), MODELS[kind].outputs(loaded))


def trained_peft(method: str, kind: str, folder: Path) -> tuple[nn.Module, nn.Module]:
    """A base model, and it with an adapter of PEFT's that is saved in a folder."""
    base = MODELS[kind].build()
    theirs = get_peft_model(copy.deepcopy(base), PEFT[method](MODELS[kind].peft)).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(folder)
    return base, theirs.get_base_model()


@pytest.mark.parametrize(("method", "kind"), covering(PEFT, MODELS, strength=1))
def test_peft_to_ours_to_peft(method: str, kind: str, tmp_path: Path) -> None:
    base, theirs = trained_peft(method, kind, tmp_path / "peft")
    ours = import_peft(tmp_path / "peft", copy.deepcopy(base))
    same(theirs, ours, kind)
    assert (MODELS[kind].outputs(base) - MODELS[kind].outputs(ours)).abs().max() > 0.05
    save_adapter(ours, tmp_path / "ours")
    export_peft(tmp_path / "ours", tmp_path / "again", model=base)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
    same(theirs, again.get_base_model(), kind)


def test_model_level_bases_alone(tmp_path: Path) -> None:
    """The second layout: PEFT's own file without the copies in every layer."""
    base, theirs = trained_peft("randlora", "timm", tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    whole = load_file(file)
    once = {name: t for name, t in whole.items() if not ("blocks" in name and name.endswith(("_A", "_B")))}
    assert len(whole) - len(once) == 16
    assert {"base_model.randlora_A", "base_model.randlora_B"} < once.keys()
    save_file(once, file, metadata={"format": "pt"})
    same(theirs, import_peft(tmp_path / "peft", copy.deepcopy(base)), "timm")
    # The first layout without the model's own copy: each layer has one.
    copies = {name: t for name, t in whole.items() if name not in ("base_model.randlora_A", "base_model.randlora_B")}
    save_file(copies, file, metadata={"format": "pt"})
    same(theirs, import_peft(tmp_path / "peft", copy.deepcopy(base)), "timm")


def test_our_file_has_the_bases_once_and_peft_s_own_names(tmp_path: Path) -> None:
    """Key for key what PEFT itself saves, without the copies."""
    base, _ = trained_peft("randlora", "timm", tmp_path / "peft")
    save_adapter(import_peft(tmp_path / "peft", copy.deepcopy(base)), tmp_path / "ours")
    export_peft(tmp_path / "ours", tmp_path / "again", model=base)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "again"))
    once = {name for name in theirs if not ("blocks" in name and name.endswith(("_A", "_B")))}
    assert ours.keys() == once
    for name in once:
        part = tuple(slice(0, size) for size in ours[name].shape)
        assert ours[name].shape == theirs[name].shape
        assert name.startswith("base_model.randlora") or torch.equal(ours[name], theirs[name][part])
    shutil.rmtree(tmp_path / "peft")
