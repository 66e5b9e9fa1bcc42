"""Every family of decoders through its shipped config: train, test, look at the adapter, merge it; and mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from randlora_pl.language.tasks.common import load_language_task
from tests.support.cli import Run

from .files import write_commonsense, write_e2e
from .small import SHAPES, typed

SMALL = (
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--run.logger", "csv"),
    *("--model.pretrained", "random", "--model.num_beams", "2", "--model.max_new_tokens", "4"),
)
FAST = ("--model.learning_rate", "0.1", "--model.warmup_steps", "0")
"""So that a step or two change the logits by more than what rounding does, which merging checks."""


@pytest.fixture(autouse=True)
def no_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program reads its tables for many seconds."""
    monkeypatch.setattr("randlora_pl.language.metrics.meteor", lambda *_: (None, "METEOR needs Java: install it"))


def words(name: str, root: Path) -> list[str]:
    """A fit with a shipped config, tiny random weights and a token for each byte."""
    kind = {"e2e_gpt2_medium": "gpt2", "commonsense_llama3": "llama"}.get(name, name.rpartition("_")[2])
    shape = json.dumps(SHAPES[kind] | {"vocab_size": 260})
    data = ["--data.epochs", "1"]
    if kind != "gpt2":
        data = ["--data.steps", "2", "--data.tests", "[boolq,winogrande]", "--data.validation", "4"]
    return ["--config", name, "--data.root", str(root), "--model.config_overrides", shape, *data, *SMALL]


TARGETS = {
    "commonsense_qwen2": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "commonsense_phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
    "commonsense_llama3": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "e2e_gpt2_medium": ["q", "v", "fc1", "fc2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_family_from_training_to_merged_weights(name: str, run: Run, tmp_path: Path) -> None:
    e2e = name.startswith("e2e")
    root = write_e2e(tmp_path / "data", more=2) if e2e else write_commonsense(tmp_path / "data", 2)
    shown = run("fit", *words(name, root), *FAST, "--run.name", "one")
    assert shown.code == 0, shown.err
    (folder,) = (tmp_path / "runs" / "one").glob("2*")
    results = json.loads((folder / "results.json").read_text())
    figures = {key for key in results if key.startswith("test/")}
    if e2e:
        assert figures == {"test/BLEU", "test/NIST", "test/ROUGE-L", "test/CIDEr"}
        assert "METEOR" in shown.err
    else:
        names = [f"{kind}{test}" for kind in ("acc", "unfound") for test in ("", "/boolq", "/winogrande")]
        assert figures == {f"test/{each}" for each in names}
    assert results["finished"] and results["data/test"] == 4
    assert f"answers: {folder.relative_to(tmp_path) / 'answers.jsonl'} (4)" in shown.out
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().split("\n")[:-1]]
    keys = {"test", "meaning", "written", "references"} if e2e else {
        "test", "prompt", "written", "found", "answer", "right"
    }  # fmt: skip
    assert [row.keys() == keys for row in rows] == [True] * 4
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["init_args"]["targets"] == TARGETS[name]
    tested = run("test", "--run", str(folder), "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu")
    assert tested.code == 0, tested.err
    assert "answers:" in tested.out and ("BLEU" if e2e else "accuracy") in tested.out
    info = run("adapter", "info", str(folder / "adapter"))
    assert info.code == 0 and "not shown" not in info.out and f"targets         {TARGETS[name][0]}" in info.out
    merged = run("adapter", "merge", str(folder / "adapter"), "--output", str(tmp_path / "merged"))
    assert merged.code == 0, merged.err
    from transformers import AutoModelForCausalLM

    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    task = load_language_task(folder / "adapter")
    ids = torch.arange(3, 20)[None]
    assert not any(key.startswith("delta") or ".delta." in key for key in bare.state_dict())
    torch.testing.assert_close(bare(ids).logits, task.model(ids).logits, rtol=1e-4, atol=1e-5)


def test_targets_that_are_left_out_are_the_paper_s(toy: Path, run: Run, tmp_path: Path) -> None:
    """The config says what was taken, the adapter file, too, and both can be used again."""
    from randlora_pl.language.tasks.common import TARGETS

    shown = run(
        "fit", *typed("bytes", "phi3", 260), *SMALL[:6], "--model.max_new_tokens", "4", "--data.dataset", "jsonl",
        "--data.root", str(toy), "--data.steps", "1", "--trainer.limit_val_batches", "0",
        "--trainer.limit_test_batches", "1", "--run.name", "one",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    (folder,) = (tmp_path / "runs" / "one").glob("2*")
    wanted = TARGETS["phi3"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["targets"] == wanted
    saved: dict[str, Any] = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert saved["targets"] == wanted and saved["metadata"]["arguments"]["targets"] == wanted
    assert (folder / "answers.jsonl").read_text().count('"right": ') == 16  # those of one batch
    again = run("test", "--adapter", str(folder / "adapter"), "--trainer.limit_test_batches", "1", *SMALL[:6])
    assert again.code == 0, again.err
