from pathlib import Path

import torch

from randlora_pl.adapters import read_adapter
from randlora_pl.adapters.save_load import copy_adapter
from randlora_pl.models import load_clip
from tests.support.cli import Refused, Run


def test_scales_and_endings(run: Run, finished: Path, tmp_path: Path) -> None:
    adapter = str(finished / "adapter")
    states = []
    for name, scale in (("zero", "0"), ("half", "0.5"), ("one", "1")):
        result = run("adapter", "merge", adapter, "--scale", scale, "--output", f"{name}.pt", "--no-head")
        assert result.code == 0 and f"scale {scale}: " in result.out
        states.append(torch.load(f"{name}.pt", weights_only=True))

    seed = read_adapter(adapter).config["base_model"].get("seed", 0)
    plain = load_clip("tiny", "random", seed=seed).model.state_dict()
    assert all(torch.equal(states[0][name], plain[name]) for name in plain)
    changed = [name for name in plain if not torch.equal(states[2][name], plain[name])]
    assert changed
    for name in changed:
        torch.testing.assert_close(states[1][name], (states[0][name] + states[2][name]) / 2)
    names = {f"{name}.{suffix}" for name in ("zero", "half", "one") for suffix in ("pt", "json")}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_bad_input(run: Run, refused: Refused, finished: Path, tmp_path: Path) -> None:
    adapter = str(finished / "adapter")
    base = ("adapter", "merge", adapter, "--output")
    (tmp_path / "mine.pt").write_text("mine")
    assert "mine.pt exists" in refused(*base, "mine.pt")
    assert ".safetensors" in refused(*base, "m.onnx")
    assert "--scale" in refused(*base, "m.pt", "--scale", "nan")
    assert "RUN/adapter" in refused("adapter", "merge", str(finished / "checkpoints"), "--output", "m.pt")
    copy_adapter(finished / "adapter", tmp_path / "one.safetensors")
    one = "one.safetensors"
    assert "would replace" in refused("adapter", "merge", one, "--output", one, "--overwrite")
    assert run(*base, "mine.pt", "--overwrite").code == 0
