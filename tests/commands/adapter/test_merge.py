from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from randlora_pl.adapters import read_adapter
from randlora_pl.adapters.save_load import copy_adapter
from randlora_pl.data import ImageData
from randlora_pl.models import clip_image_spec, load_clip
from randlora_pl.tasks import load_task
from tests.support.cli import Run


def all_test_digits() -> Tensor:
    """(360, 3, 32, 32), as the metadata of the merged file and the printed lines say."""
    spec = clip_image_spec("tiny")
    data = ImageData(
        dataset="digits", image_size=spec.size, mean=spec.mean, std=spec.std, interpolation=spec.interpolation
    )
    data.setup("test")
    return torch.cat([batch["image"] for batch in data.test_dataloader()])


@pytest.mark.slow
@torch.no_grad()
def test_bare_open_clip_predicts_the_same_on_all_test_digits(run: Run, finished: Path, tmp_path: Path) -> None:
    """Class embeddings of the written head, in the library alone, by the lines that are printed."""
    result = run("adapter", "merge", str(finished / "adapter"), "--output", "merged-digits.safetensors")
    assert result.code == 0, result.err
    assert "scale 1: the tuned weights" in result.out and "largest difference" in result.out
    lines = [line[2:] for line in result.out.splitlines() if line.startswith("  ")]
    place: dict[str, Any] = {}
    exec("\n".join(lines), place)
    head = load_file("merged-digits.head.safetensors")["head"]
    images = all_test_digits()
    assert len(images) > 300
    found = F.normalize(place["model"].eval().encode_image(images), dim=-1) @ head.T
    expected = load_task(finished / "adapter").class_logits(images)
    assert torch.equal(found.argmax(1), expected.argmax(1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert "merged-digits" in open_clip.list_models()


def test_scales_and_endings(run: Run, finished: Path, tmp_path: Path) -> None:
    adapter = str(finished / "adapter")
    states = []
    for name, scale in (("zero", "0"), ("half", "0.5"), ("one", "1")):
        result = run("adapter", "merge", adapter, "--scale", scale, "--output", f"{name}.pt", "--no-head")
        assert result.code == 0 and f"scale {scale}: " in result.out
        states.append(torch.load(f"{name}.pt", weights_only=True))

    plain = load_clip(
        "tiny", "random", seed=read_adapter(adapter).config["base_model"].get("seed", 0)
    ).model.state_dict()
    assert all(torch.equal(states[0][name], plain[name]) for name in plain)
    changed = [name for name in plain if not torch.equal(states[2][name], plain[name])]
    assert changed
    for name in changed:
        torch.testing.assert_close(states[1][name], (states[0][name] + states[2][name]) / 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.{suffix}" for name in ("zero", "half", "one") for suffix in ("pt", "json")
    )


def test_one_bfloat16_file(run: Run, finished: Path, tmp_path: Path) -> None:
    copy_adapter(finished / "adapter", tmp_path / "half.safetensors", torch.bfloat16)
    assert run("adapter", "merge", "half.safetensors", "--output", "m.safetensors").code == 0


def test_bad_input(
    run: Run, refused: Callable[..., str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = str(finished / "adapter")
    base = ("adapter", "merge", adapter, "--output")
    (tmp_path / "mine.pt").write_text("mine")
    assert "mine.pt exists" in refused(*base, "mine.pt")
    assert ".safetensors" in refused(*base, "m.onnx")
    assert "--scale" in refused(*base, "m.pt", "--scale", "nan")
    assert "'--scale'" in refused(*base, "m.pt", "--scales", "1")
    assert "RUN/adapter" in refused("adapter", "merge", str(finished / "checkpoints"), "--output", "m.pt")
    assert "required: --output" in refused("adapter", "merge", adapter)
    copy_adapter(finished / "adapter", tmp_path / "one.safetensors")
    assert "would replace" in refused(
        "adapter", "merge", "one.safetensors", "--output", "one.safetensors", "--overwrite"
    )
    assert run(*base, "mine.pt", "--overwrite").code == 0
