"""Spectra of adapters from their files."""

from pathlib import Path
from typing import Any

import pytest
import torch

from randlora_pl.adapters import FullFineTuning, LoRA, RandLoRA, inject, read_adapter, save_adapter
from randlora_pl.adapters.operations import delta_weights
from randlora_pl.lab.analysis.weights import (
    common_layers,
    curve,
    layer_spectrum,
    matrix_updates,
    means,
    spectrum_figure,
)
from randlora_pl.models import load_clip
from randlora_pl.utils.errors import UserError
from tests.tasks.small import two_blocks

WIDTH = {"visual": 192, "transformer": 128}


def saved(folder: Path, adapter: Any) -> tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """An adapter of the tiny CLIP that has moved: its file, the base's weights and the model's."""
    clip = load_clip("tiny", "random")
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    inject(clip.model, adapter)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in clip.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    path = save_adapter(clip.model, folder, base_model=clip.identity.as_dict())
    after = dict(clip.model.state_dict()) if adapter.trains_base else delta_weights(clip.model)
    return path, before, after


def test_low_and_full_rank_and_full_fine_tuning(tmp_path: Path) -> None:
    with two_blocks():
        adapters = {"lora": LoRA(rank=3), "randlora": RandLoRA(rank=8), "full": FullFineTuning()}
        found = {}
        for name, adapter in adapters.items():
            path, before, after = saved(tmp_path / name, adapter)
            updates = matrix_updates(read_adapter(path))
            if name == "full":
                assert not any("ln_" in layer or "embedding" in layer for layer in updates)
                key = "visual.transformer.resblocks.1.attn.in_proj"
                torch.testing.assert_close(updates[key], after[f"{key}_weight"] - before[f"{key}_weight"])
                key = "transformer.resblocks.0.mlp.c_proj"
                torch.testing.assert_close(updates[key], after[f"{key}.weight"] - before[f"{key}.weight"])
            else:
                assert updates.keys() == after.keys()
                for layer, update in updates.items():
                    torch.testing.assert_close(update, after[layer])
            found[name] = [layer_spectrum(layer, update) for layer, update in updates.items()]
    assert {one.sizes.rank for one in found["lora"]} == {3}
    for name in ("randlora", "full"):
        assert all(one.sizes.rank >= 0.97 * len(one.values) for one in found[name])
    for one in found["full"]:
        assert len(one.values) == min(one.shape) == WIDTH[one.layer.split(".")[0]]
        assert one.sizes.norm == pytest.approx(float(one.values.norm()), rel=1e-9)
    shared = common_layers(list(found.values()))
    assert shared == [one.layer for one in found["lora"]] and len(shared) == 12
    assert len(found["full"]) == 17  # the output projections and the patch embedding, too
    assert means(found["lora"]) | {"rank": 3.0, "full_rank": 160.0} == means(found["lora"])
    figure = spectrum_figure(found)
    assert [len(axes.get_lines()) for axes in figure.axes] == [3, 3, 3]
    assert len(figure.axes[1].get_lines()[2].get_xdata()) == 12  # type: ignore[arg-type]


def test_curves_of_layers_of_different_width_are_put_together() -> None:
    layers = [layer_spectrum("a", torch.diag(torch.tensor([4.0, 2.0, 1.0]))), layer_spectrum("b", torch.eye(5) * 7)]
    shares, middle, low, high = curve(layers, 5)
    assert shares.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert high.tolist() == [1] * 5 and low.tolist() == [1, 0.75, 0.5, 0.375, 0.25]
    assert middle.tolist() == [1, 0.875, 0.75, 0.6875, 0.625]
    empty = curve([layer_spectrum("zero", torch.zeros(3, 3))], 5)
    assert all(value != value for value in empty[1].tolist())


def test_an_update_that_is_not_finite_is_named() -> None:
    with pytest.raises(UserError, match=r"some\.layer"):
        layer_spectrum("some.layer", torch.full((2, 2), float("nan")))


def test_full_fine_tuning_of_conv1d_is_seen(tmp_path: Path) -> None:
    """GPT-2's linear layers are transformers' Conv1D, whose weights are stored (in, out)."""
    pytest.importorskip("transformers", reason="pip install '.[language]'")
    from tests.language.small import make

    task = make("bytes", "gpt2", adapter=FullFineTuning(), overrides={"vocab_size": 260})
    task.configure_model()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    updates = matrix_updates(read_adapter(task.save(tmp_path / "adapter")))
    layers = {f"transformer.h.{block}.{name}" for block in (0, 1) for name in (
        "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"
    )}  # fmt: skip
    assert layers <= updates.keys() <= layers | {"lm_head"}
    for layer in layers:
        change = task.model.state_dict()[f"{layer}.weight"] - before[f"{layer}.weight"]
        torch.testing.assert_close(updates[layer], change.T)
    assert updates["transformer.h.0.mlp.c_fc"].shape == (192, 48)
