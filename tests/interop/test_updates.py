"""Updates by state-dict key and by layer, with and without the base model, against differences made by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from randlora_pl.adapters import LoRA, RandLoRA, delta_weights, inject, merge, read_adapter, save_adapter
from randlora_pl.interop.base_model import (
    base_name,
    interpolate,
    layer_updates,
    load_base,
    same_base,
    updates,
)
from randlora_pl.models import load_clip
from randlora_pl.utils.errors import UserError
from tests.adapters import zoo
from tests.support.products import in_two_items, marked

from .adapters import MORE, rounded, saved

OFTEN = ("randlora", "adalora", "dora", "full", "bitfit", "pissa", "split", "oft")


@in_two_items("method", marked(zip(MORE), lambda row: row[0] in OFTEN))
def test_updates_are_the_differences_of_the_weights(method: str, tmp_path: Path) -> None:
    """By key, and by layer from the file alone."""
    task = saved(tmp_path / "a", method=method)
    file = read_adapter(tmp_path / "a")
    layers = layer_updates(file)
    assert list(layers) == list(file.layers)
    if not file.adapter.trains_base:
        expected = delta_weights(task.model)
        assert all(torch.equal(delta, expected[layer]) for layer, delta in layers.items())
    base = load_base(file)
    plain = base.model.state_dict()
    before = {key: value.clone() for key, value in plain.items()}
    found = updates(base, file)
    merge(task.model)
    after = task.model.state_dict()
    for key, value in plain.items():
        assert torch.equal(value, before[key])  # the base model is left alone
        if key in after:
            torch.testing.assert_close(
                after[key] - value, found.get(key, torch.zeros(())).expand_as(value), atol=1e-6, rtol=0
            )
    assert found and found.keys() <= plain.keys() and all(update.any() for update in found.values())


def test_layers_of_a_model_that_no_library_builds(tmp_path: Path) -> None:
    """Names such as ``0`` and one without a path, saved by `save_adapter` alone, in one bfloat16 file."""
    for name, model in (("many", zoo.mlp()), ("one", nn.Linear(6, 4)), ("blocks", zoo.small_vit())):
        inject(model, RandLoRA(rank=2, seed=3))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.5)
        save_adapter(model, tmp_path / name)
        expected = delta_weights(model)
        found = layer_updates(read_adapter(tmp_path / name))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[layer], expected[layer]) for layer in expected)
        coarse = layer_updates(rounded(tmp_path / name, tmp_path / f"{name}.safetensors"))
        for layer in expected:
            torch.testing.assert_close(coarse[layer], expected[layer], rtol=0.05, atol=0.05)
        with pytest.raises(UserError, match="is an adapter of an unnamed base model, and only"):
            load_base(read_adapter(tmp_path / name))


def test_interpolation_has_both_ends_bit_for_bit() -> None:
    base, tuned = torch.randn(50) * 1e-9, torch.randn(50)
    assert torch.equal(interpolate(base, tuned, 0.0), base)
    assert torch.equal(interpolate(base, tuned, 1.0), tuned)
    by_hand = torch.tensor([b + 0.3 * (t - b) for b, t in zip(base.tolist(), tuned.tolist(), strict=True)])
    assert torch.equal(interpolate(base, tuned, 0.3), by_hand)


# What is refused


def test_different_bases_are_named(tmp_path: Path) -> None:
    saved(tmp_path / "a", method="lora", seed=0)
    saved(tmp_path / "b", method="lora", seed=1)
    saved(tmp_path / "c", "vision-language", "lora", seed=0)  # the same model, with its text tower
    one, two, three = (read_adapter(tmp_path / name) for name in "abc")
    same_base([one, three])
    with pytest.raises(UserError) as caught:
        same_base([one, two])
    for part in (str(one.path), str(two.path), base_name(one), base_name(two)):
        assert part in str(caught.value)
    plain = nn.Linear(3, 3)
    inject(plain, LoRA(rank=1))
    save_adapter(plain, tmp_path / "d")
    with pytest.raises(UserError, match="different"):
        same_base([read_adapter(tmp_path / "d"), one])


def test_weights_that_moved_or_changed(tmp_path: Path) -> None:
    there = tmp_path / "there.pt"
    torch.save(load_clip("tiny", "random", seed=3).model.state_dict(), there)
    saved(tmp_path / "a", pretrained=str(there))
    file = read_adapter(tmp_path / "a")
    assert load_base(file).part is not load_base(file).model
    torch.save(load_clip("tiny", "random", seed=4).model.state_dict(), there)
    with pytest.raises(UserError, match="--pretrained"):
        load_base(file)
    there.unlink()
    with pytest.raises(UserError, match=r"there\.pt"):
        load_base(file)
    assert layer_updates(file)  # needs no base


def edited(path: Path, change: dict[str, Any]) -> Any:
    """The adapter with another description, as one that was edited on purpose."""
    description = path / "adapter_config.json"
    config = json.loads(description.read_text()) | change
    del config["sha256"]
    description.write_text(json.dumps(config))
    return read_adapter(path)


def test_other_bases_and_missing_tensors_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    file = edited(tmp_path / "a", {"fingerprint": "0" * 64})
    with pytest.raises(UserError, match="000000000000"):
        layer_updates(file)
    saved(tmp_path / "b", method="lora")
    file = read_adapter(tmp_path / "b")
    file.tensors.pop(next(name for name in file.tensors if "in_proj" not in name))
    with pytest.raises(UserError, match="tensor"):
        layer_updates(file)
    with pytest.raises(UserError, match="task on texts"):
        load_base(edited(tmp_path / "b", {"base_model": {"library": "transformers", "name": "x"}}))
