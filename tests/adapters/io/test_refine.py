"""Methods that start where a LoRA has ended."""

from pathlib import Path
from typing import Any

import pytest
import torch

from randlora_pl.adapters import LoRA, RandLoRA, Together, inject, load_adapter, refine, save_adapter
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import KINDS, assert_close, inputs, randomise
from tests.support.products import in_one_item


@in_one_item(("kind", "form"), [(kind, form) for kind in KINDS for form in ("beside", "absorbed")])
def test_starts_with_the_outputs_of_the_lora_on_every_kind_of_layer(kind: str, form: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = KINDS[kind]
    base = case.build()
    model, other, plain = (case.build() for _ in range(3))
    for each in (model, other, plain):
        each.load_state_dict(base.state_dict())
    inject(base, LoRA(rank={".*": 2}, alpha=4.0, rslora=True, qkv=case.qkv), case.targets)
    randomise(base)
    x = inputs(base)
    save_adapter(base, tmp_path / "lora")
    adapter = RandLoRA(rank=3, qkv=case.qkv, seed=4)
    report = refine(model, tmp_path / "lora", adapter, form)
    assert_close(model(x), base(x), 1e-6)
    assert (model(x) - plain(x)).abs().max() > 1e-2
    alone = inject(plain, adapter, case.targets).trainable
    assert report.trainable == alone + (base.adapter_report.trainable if form == "beside" else 0)  # type: ignore[union-attr, operator]
    randomise(model)
    save_adapter(model, tmp_path / "next")
    load_adapter(other, tmp_path / "next")
    assert torch.equal(other(x), model(x))


def test_ranks_by_layer_and_what_does_not_fit(tmp_path: Path) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return torch.nn.ModuleDict({"one": torch.nn.Linear(8, 8), "two": torch.nn.Linear(8, 8)})

    base = make()
    inject(base, LoRA(rank={"one": 1, "two": 3}, alpha=4.0), ["one", "two"])
    randomise(base)
    save_adapter(base, tmp_path / "lora")
    model = make()
    report = refine(model, tmp_path / "lora", RandLoRA(rank=2), "absorbed")
    assert model["one"].delta.lead.shape == (8, 1) and model["two"].delta.lead.shape == (8, 3)
    assert report.adapter.lead == {"^one": 1, "^two": 3}  # type: ignore[attr-defined]
    x = torch.randn(5, 8)
    assert_close(model["two"](x), base["two"](x), 1e-6)

    both = Together([LoRA(rank={"one": 1, "two": 3}, alpha=4.0), RandLoRA(rank=2)], rates=[0.1, 1])
    report = refine(rated := make(), tmp_path / "lora", both)
    assert report.adapter is both
    assert_close(rated["two"](x), base["two"](x), 1e-6)
    whole = make()
    inject(whole, LoRA(rank=1), ["one"], trained=["two"])
    save_adapter(whole, tmp_path / "whole")
    inject(hira := make(), RandLoRA(rank=2), ["one"])
    save_adapter(hira, tmp_path / "randlora")
    for lora, adapter, form, message in (
        (
            "lora",
            Together([LoRA(rank=4), RandLoRA(rank=2)]),
            "beside",
            "rank 4, not .*3.* and alpha 1.0, not 4.0, as",
        ),
        ("whole", RandLoRA(rank=2), "beside", "also changes the model's own two"),
        ("randlora", RandLoRA(rank=2), "beside", "is RandLoRA, and a stage starts from LoRA"),
        ("lora", LoRA(rank=2), "absorbed", "LoRA cannot absorb a LoRA"),
        ("lora", RandLoRA(rank=2), "absorb", "form is 'absorb': choose beside or absorbed"),
        ("lora", RandLoRA(rank=4), "absorbed", "lead is 3, but two has 2 bases"),
    ):
        with pytest.raises(UserError, match=message):
            refine(make(), tmp_path / lora, adapter, form)  # type: ignore[arg-type]
    changed = make()
    torch.nn.init.zeros_(changed["two"].weight)
    with pytest.raises(UserError, match=r"trained on other weights .* Remove --model.name"):
        refine(changed, tmp_path / "lora", RandLoRA(rank=2))
