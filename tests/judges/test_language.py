"""PEFT judges each method on whole language models: updates, outputs, and every gradient, with and without dropout."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, RandLoraConfig, VeraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from randlora_pl.adapters import (
    DoRA,
    LoRA,
    RandLoRA,
    inject,
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
