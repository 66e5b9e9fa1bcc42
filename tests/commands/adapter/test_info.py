import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from randlora_pl.adapters import (
    DoRA,
    FullFineTuning,
    LinearProbe,
    LoRA,
    RandLoRA,
    VeRA,
    delta_weights,
    inject,
    read_adapter,
    save_adapter,
)
from randlora_pl.models import load_clip
from randlora_pl.tasks import LinearHeadTask, load_task
from tests.support.cli import Refused, Run
from tests.tasks.small import CLASSES, TEMPLATES, shake


def told(run: Run, path: Path) -> dict[str, Any]:
    result = run("adapter", "info", str(path), "--json")
    assert result.code == 0, result.err
    found: dict[str, Any] = json.loads(result.out)
    return found


def test_everything_that_a_run_has_saved(run: Run, finished: Path) -> None:
    result = run("adapter", "info", str(finished / "adapter"))
    assert result.code == 0, result.err
    file = read_adapter(finished / "adapter")
    count = sum(tensor.numel() for tensor in file.tensors.values())
    for text in (
        "RandLoRA: rank ", "(format 4)", f"{count:,} parameters", f"{4 * count:,} bytes of float32", "open_clip tiny",
        file.config["base_model"]["weights_sha256_sampled"][:12], file.config["fingerprint"][:12], "checked",
        "10: zero, one, two, three, four, ...", "stable rank", "effective rank", "visual.transformer.resblocks.*.",
    ):  # fmt: skip
        assert text in result.out, text
    assert "not shown" not in result.out
    frame, lines = file.metadata["training"]["frame"], result.out.splitlines()
    images = next(line for line in lines if line.startswith("images"))
    assert f" {frame['size']} pixels: lay transparent pictures on white, resize the shorter side to 32 " in images
    assert any(line.startswith("training ") for line in lines)
    assert "frame {" not in result.out
    every = run("adapter", "info", str(finished / "adapter"), "--layers").out
    assert all(layer in every for layer in file.layers)


def test_figures_of_the_layers(run: Run, finished: Path) -> None:
    found = told(run, finished / "adapter")
    assert found == told(run, finished), "a run stands for its adapter"
    task = load_task(finished / "adapter")
    updates, state = delta_weights(task.model), load_clip("tiny", "random", seed=task.seed).model.state_dict()
    assert [row["layer"] for row in found["layers"]] == list(updates) and found["missing"] == []
    for row in found["layers"]:
        name = row["layer"]
        base = state[f"{name}_weight" if name.endswith("in_proj") else f"{name}.weight"].double()
        delta = updates[name].double()
        values = torch.linalg.svdvals(delta)
        assert row["norm"] == pytest.approx(float(delta.norm()), rel=1e-6)
        assert row["base_norm"] == pytest.approx(float(base.norm()), rel=1e-6)
        assert row["ratio"] == pytest.approx(float(delta.norm() / base.norm()), rel=1e-6)
        assert row["stable_rank"] == pytest.approx(float(delta.norm() ** 2 / values[0] ** 2), rel=1e-6)
        assert row["rank"] <= min(row["shape"])


def test_without_the_base_model(run: Run, tmp_path: Path) -> None:
    """Weights that are not here any more: everything that the file tells, and why the rest is missing."""
    there = tmp_path / "there.pt"
    torch.save(load_clip("tiny", "random", seed=3).model.state_dict(), there)
    adapters = (RandLoRA(rank=8), VeRA(rank=8), DoRA(LoRA(rank=2)), FullFineTuning())  # two of them are linear
    for number, adapter in enumerate(adapters):
        targets = None if adapter.trains_base else ["fc1"]
        task = LinearHeadTask(name="tiny", pretrained=str(there), adapter=adapter, targets=targets)
        task.set_classes(CLASSES, TEMPLATES)
        task.adapt()
        shake(task)
        task.save(tmp_path / str(number))
    with_base = [told(run, tmp_path / str(number)) for number in range(4)]
    there.unlink()
    for number, full in enumerate(with_base):
        alone = told(run, tmp_path / str(number))
        assert full["missing"] == [] and len(alone["missing"]) == 1 and "there.pt" in alone["missing"][0]
        assert alone["fingerprint"] == full["fingerprint"] and alone["parameters"] == full["parameters"]
        for one, two in zip(alone["layers"], full["layers"], strict=True):
            assert one["ratio"] is None and one["base_norm"] is None
            assert two["ratio"] is None if two["base_norm"] == 0 else two["ratio"] > 0  # biases start at zero
            assert one["norm"] == (two["norm"] if number < 2 else None)
        text = run("adapter", "info", str(tmp_path / str(number))).out
        assert sum(line.startswith("not shown, ") for line in text.splitlines()) == 1


def test_adapters_without_a_task_and_without_layers(run: Run, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    inject(model, RandLoRA(rank=2))
    save_adapter(model, tmp_path / "plain.safetensors")
    result = run("adapter", "info", "plain.safetensors")
    assert result.code == 0 and "not named" in result.out and "5 x 6" in result.out
    assert (
        "not shown, weights of the base model: plain.safetensors is an adapter of an unnamed base model" in result.out
    )
    task = LinearHeadTask(name="tiny", pretrained="random", adapter=LinearProbe())
    task.set_classes(CLASSES, TEMPLATES)
    task.adapt()
    task.save(tmp_path / "probe")
    found = told(run, tmp_path / "probe")
    assert found["parameters"] == 0 and found["head_parameters"] == 4 * 128 and found["layers"] == []
    assert run("adapter", "info", "probe").code == 0


def test_bad_input(run: Run, refused: Refused, finished: Path, tmp_path: Path) -> None:
    assert "adapter folder" in refused("adapter", "info", "nowhere")
    copy = tmp_path / "copy"
    shutil.copytree(finished / "adapter", copy)
    text = (copy / "adapter_config.json").read_text()
    (copy / "adapter_config.json").write_text(text.replace('"rank": 6', '"rank": 5'))
    assert "damaged" in refused("adapter", "info", "copy")
    config = json.loads(text)
    config["fingerprint"] = "0" * 64
    del config["sha256"]
    (copy / "adapter_config.json").write_text(json.dumps(config))
    result = run("adapter", "info", "copy")
    assert "not shown, updates: copy: its random bases are 000000000000" in result.out and "checked" not in result.out
