"""PEFT judges each method on whole language models: updates, outputs, and every gradient, with and without dropout."""

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, RandLoraConfig, VeraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from randlora_pl.adapters import (
    Adapter,
    DoRA,
    LoRA,
    RandLoRA,
    VeRA,
    inject,
    load_adapter,
    save_adapter,
    set_train_mode,
)
from randlora_pl.adapters.kernels.common import dropped
from randlora_pl.interop.peft_export import export_peft
from randlora_pl.interop.peft_import import import_peft
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import assert_close, randomise
from tests.judges.models import MODELS
from tests.support.products import covering, in_one_item

FAMILIES = ["qwen2", "llama", "phi3", "roberta", "gpt2"]
CONFIGS: dict[str, Callable[[Any, float], Any]] = {
    "randlora": lambda targets, p: RandLoraConfig(r=5, randlora_alpha=7, randlora_dropout=p, target_modules=targets),
    "lora": lambda targets, p: LoraConfig(r=3, lora_alpha=5, lora_dropout=p, target_modules=targets),
    "dora": lambda targets, p: LoraConfig(r=3, lora_alpha=5, lora_dropout=p, target_modules=targets, use_dora=True),
    "vera": lambda targets, p: VeraConfig(r=7, vera_dropout=p, target_modules=targets),
}
# PEFT's names of what trains, and whether ours is the transpose.
TENSORS = {
    "randlora_lambda": ("lambdas", True),
    "randlora_gamma": ("gammas", False),
    "vera_lambda_b": ("b", False),
    "vera_lambda_d": ("d", False),
    "lora_A": ("A", False),
    "lora_B": ("B", False),
    "lora_magnitude_vector": ("magnitude", False),
}


def pair(method: str, family: str, dropout: float, folder: Path) -> tuple[Any, nn.Module]:
    """A model with PEFT's adapter, trained to random values, and with ours imported from it."""
    kind = MODELS[family]
    base = kind.build()
    theirs = get_peft_model(copy.deepcopy(base), CONFIGS[method](kind.peft, dropout)).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(folder)
    return theirs, import_peft(folder, base).eval()


def trained(theirs: Any, ours: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter, bool]]:
    """What trains in both: PEFT's parameter, ours, and whether it is the transpose."""
    own = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    for name, parameter in theirs.named_parameters():
        if not parameter.requires_grad:
            continue
        path, short = next(
            (name.partition(f".{short}.")[0].removeprefix("base_model.model."), short)
            for short in TENSORS
            if f".{short}." in name
        )
        tensor, turned = TENSORS[short]
        key = f"{path}.delta.{tensor}"
        yield name, parameter, own.pop(key if key in own else f"{path}.delta.inner.{tensor}"), turned
    assert not own


@pytest.mark.parametrize(("dropout", "method", "family"), covering([0.0, 0.4], CONFIGS, FAMILIES, strength=1))
def test_outputs_and_gradients_are_peft_s(
    dropout: float, method: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one seed both drop the same entries, as PEFT's dropout takes our masks here."""
    theirs, ours = pair(method, family, dropout, tmp_path)
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: dropped(x, self.p) if self.training and self.p else x)
    for module in theirs.modules():  # frozen layers rest
        if isinstance(module, BaseTunerLayer):
            module.train()  # type: ignore[attr-defined]
    set_train_mode(ours)
    outputs = []
    for model in (theirs.get_base_model(), ours):
        torch.manual_seed(5)
        outputs.append(MODELS[family].call(model))
        weights = torch.linspace(-1, 1, outputs[-1].numel()).view_as(outputs[-1])
        (outputs[-1] * weights).sum().backward()
    assert_close(outputs[1], outputs[0], 1e-5)
    ours.eval()
    still = MODELS[family].outputs(ours)
    assert ((outputs[1] - still).abs().max() > 0.01) == (dropout > 0)
    for _, first, second, turned in trained(theirs, ours):
        assert first.grad is not None and second.grad is not None
        assert_close(second.grad, first.grad.T if turned else first.grad, 1e-4)
        assert second.grad.any()


@pytest.mark.parametrize(("family", "targets"), [("gpt2", ["q", "v", "mlp"]), ("phi3", ["q", "k", "v"])])
def test_lora_on_blocks_of_a_fused_weight_goes_to_peft(family: str, targets: list[str], tmp_path: Path) -> None:
    base = MODELS[family].build()
    ours = copy.deepcopy(base)
    inject(ours, LoRA(rank=3, alpha=2.5), targets)
    randomise(ours, 0.5)
    save_adapter(ours, tmp_path / "ours")
    export_peft(tmp_path / "ours", tmp_path / "peft", model=base)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft")
    assert_close(MODELS[family].outputs(theirs.get_base_model()), MODELS[family].outputs(ours), 1e-5)
    assert (MODELS[family].outputs(base) - MODELS[family].outputs(ours)).abs().max() > 0.05


@in_one_item(
    ("adapter", "family", "targets", "message"),
    [
        (LoRA(rank=3), "phi3", ["k", "v"], "qkv_proj is adapted in k and v alone, and the rows are unknown"),
        (RandLoRA(rank=5, pairing="peft"), "gpt2", ["q", "v"], "h.0.attn.c_attn.q is a block of a packed weight"),
        (DoRA(LoRA(rank=3)), "gpt2", ["q", "v"], "h.0.attn.c_attn.q is a block of a packed weight"),
    ],
)
def test_blocks_that_peft_has_no_form_for(
    adapter: Any, family: str, targets: list[str], message: str, tmp_path: Path
) -> None:
    base = MODELS[family].build()
    ours = copy.deepcopy(base)
    inject(ours, adapter, targets)
    save_adapter(ours, tmp_path / "ours")
    with pytest.raises(UserError, match=f"cannot be a PEFT adapter: .*{message}"):
        export_peft(tmp_path / "ours", tmp_path / "peft", model=base)
    assert not (tmp_path / "peft").exists()


# Ours to PEFT to ours, and PEFT to ours to PEFT: the same outputs at every stop, in models of three libraries


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
