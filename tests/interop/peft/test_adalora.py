"""AdaLoRA goes to PEFT as LORA and as ADALORA, and PEFT's ADALORA comes back; PEFT is the judge."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn

from randlora_pl.adapters import AdaLoRA, LoRA, inject, save_adapter
from randlora_pl.interop.peft_export import export_peft
from randlora_pl.interop.peft_import import import_peft
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import assert_close, randomise
from tests.adapters.zoo import images, small_vit
from tests.support.products import in_one_item


def pruned(base: nn.Module, adapter: AdaLoRA, path: Path) -> nn.Module:
    """An adapter whose ranks are pruned at random: the first layer has none, the last block has all."""
    model = copy.deepcopy(base)
    report: Any = inject(model, adapter)
    randomise(model, 0.3)
    updates = report.procedure.updates
    for number, update in enumerate(updates):
        update.mask.copy_(torch.rand(len(update.E)) < 0.5)
        update.mask[:1] = True
        if number in (0, len(updates) - 1):
            update.mask.fill_(number > 0)
        with torch.no_grad():
            update.E.mul_(update.mask)
    report.procedure.ran = True
    save_adapter(model.eval(), path)
    return model


FORMS: dict[str, tuple[AdaLoRA, str | None]] = {
    "lora": (AdaLoRA(rank=6, alpha=30, dropout=0.1), None),
    "lora, q k v apart": (AdaLoRA(rank=6, alpha=30, qkv="split"), None),
    "lora, ranks by layer": (AdaLoRA(rank={".*mlp.*": 3, ".*": 6}, alpha={".*fc1": 10.0, ".*": 24.0}), None),
    "adalora": (AdaLoRA(rank=6, alpha=30, dropout=0.1), "ADALORA"),
    "adalora, ranks by layer": (AdaLoRA(rank={".*mlp.*": 3, ".*": 6}, alpha={".*fc1": 10.0, ".*": 24.0}), "ADALORA"),
}


@in_one_item("name", FORMS)
def test_peft_loads_what_we_export(name: str, tmp_path: Path) -> None:
    adapter, form = FORMS[name]
    base = small_vit()
    ours = pruned(base, adapter, tmp_path / "ours")
    found = export_peft(tmp_path / "ours", tmp_path / "peft", model=base, peft_type=form).difference
    assert found is not None and found.change > 1e-2
    theirs: Any = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").eval()
    x = images().double()
    expected = ours.double()(x)
    assert_close(theirs.double().get_base_model()(x), expected, 2e-6)
    assert_close(theirs.merge_and_unload()(x), expected, 2e-6)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["peft_type"] == (form or "LORA")
    again: Any = import_peft(tmp_path / "peft", copy.deepcopy(base)).eval()
    report = again.adapter_report
    assert isinstance(report.adapter, AdaLoRA if form else LoRA)
    assert_close(again.double()(x), expected, 2e-6)
    if form:
        masks = [update.mask.tolist() for update in report.procedure.updates]
        assert masks == list(config["rank_pattern"].values())
        assert sum(masks[0]) == 0 and report.procedure.ran
    else:
        paths = {row.layer for row in report.rows}
        whole = {update.layer for update in ours.adapter_report.procedure.updates}  # type: ignore[union-attr]
        assert name == "lora, q k v apart" or len(paths) == len(whole) - 1, "a layer without ranks is left out"


@in_one_item(("steps", "start"), [(0, "pissa"), (6, True)])
def test_what_peft_saved_comes_back(steps: int, start: Any, tmp_path: Path) -> None:
    """Before the first step, and after a training that has pruned."""
    base = small_vit()
    options = {"target_modules": ["qkv", "fc1"], "init_lora_weights": start}  # the latter has no effect in AdaLoRA
    config = AdaLoraConfig(init_r=5, target_r=2, lora_alpha=40, total_step=6, tfinal=2, lora_dropout=0.1, **options)
    theirs: Any = get_peft_model(copy.deepcopy(base), config).eval()
    optimizer = torch.optim.AdamW([p for n, p in theirs.named_parameters() if "lora_" in n], lr=0.05)
    x = images()
    for step in range(steps):
        optimizer.zero_grad()
        (theirs(x) - x.mean()).square().mean().backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
    theirs.save_pretrained(tmp_path / "peft")
    ours: Any = import_peft(tmp_path / "peft", copy.deepcopy(base)).eval()
    assert_close(ours.double()(x.double()), theirs.double()(x.double()), 2e-6)
    assert ours.adapter_report.adapter.target_rank == 2
    save_adapter(ours.float(), tmp_path / "ours")
    for form in (None, "ADALORA"):
        export_peft(tmp_path / "ours", tmp_path / f"again {form}", model=base, peft_type=form)
        back: Any = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / f"again {form}").eval()
        assert_close(back.double()(x.double()), theirs(x.double()), 2e-6)


@in_one_item(
    ("change", "message"),
    [
        ({"init_r": 7}, "lora_E of blocks.0.attn.qkv has shape .* and its config keeps . of 7 ranks"),
        ({"init_r": "5"}, "init_r is '5'"),
        ({"rank_pattern": {"blocks.0.attn.qkv.lora_E": [1, 2]}}, "rank_pattern"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\] in its config"),
        ({"rank_pattern": None}, "its config keeps 6 of 6 ranks"),
        ({"use_rslora": True}, "use_rslora"),
    ],
)
def test_damaged_files_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = small_vit()
    pruned(base, AdaLoRA(rank=6), tmp_path / "ours")
    export_peft(tmp_path / "ours", tmp_path / "peft", model=base, peft_type="ADALORA")
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        import_peft(tmp_path / "peft", copy.deepcopy(base))


def test_other_adapters_have_no_such_form(tmp_path: Path) -> None:
    base = small_vit()
    inject(model := copy.deepcopy(base), LoRA(rank=2))
    save_adapter(model, tmp_path / "ours")
    for form in ("ADALORA", "LORA"):
        with pytest.raises(UserError, match=rf"peft_type is {form}\. Use ADALORA with an AdaLoRA"):
            export_peft(tmp_path / "ours", tmp_path / "peft", model=base, peft_type=form)
