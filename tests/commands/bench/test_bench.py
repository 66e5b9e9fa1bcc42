import csv
import json
from pathlib import Path

import pytest

from tests.support.cli import Run
from tests.support.products import in_one_item, marked

SMALL = ("train", "--model", "test_vit", "--batch-size", "2", "--rounds", "2", "--threads", "1")
METHODS = ("--methods", "full", "lora")
FILES = ["bench.json", "bench.png", "table.md"]


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement is of one step, not of as many as fill some tenths of a second."""
    monkeypatch.setattr("randlora_pl.lab.bench.steps._LEAST", 0.02)


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def test_whole_training_steps_are_measured(run: Run, tmp_path: Path) -> None:
    words = (*SMALL, *METHODS)
    done = run("bench", *words)
    assert done.code == 0, done.err
    folder = only(tmp_path / "runs" / "bench-train")
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert "test_vit (timm), 2 images of 160 pixels, float32; " in done.out and "1 threads" in done.out
    assert "2 methods, 2 interleaved rounds" in done.out and "of full" in done.out
    report = json.loads((folder / "bench.json").read_text())
    assert report["command"] == f"randlora-pl bench {' '.join(words)}"
    assert report["machine"]["threads"] == 1 and report["setup"]["batch_size"] == 2
    cases = {case["name"]: case for case in report["cases"]}
    assert len(cases) == 2 and all(len(case["seconds"]) == 2 or case["problem"] for case in cases.values())
    assert cases["lora"]["times_base"]["median"] > 0 and cases["full"]["times_base"] is None
    assert f"`{report['command']}`" in (folder / "table.md").read_text()


def test_batches_of_several_adapters_are_measured(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("randlora_pl.lab.bench.batch.COUNTS", (1, 2, 3))
    done = run("bench", "batch", "--model", "test_vit", "--methods", "lora", "dora", "--rounds", "2", "--threads", "1")
    assert done.code == 0, done.err
    folder = only(tmp_path / "runs" / "bench-batch")
    cases = json.loads((folder / "bench.json").read_text())["cases"]
    assert [case["applied"] for case in cases] == ["together", "by adapter"]
    assert all(list(case["seconds"]) == [*(f"{n} adapters" for n in (1, 2, 3)), "single passes"] for case in cases)
    assert all(len(own) == 2 and min(own) > 0 for case in cases for own in case["seconds"].values())
    assert "single passes" in done.out and "test_vit, 3 images" in (folder / "table.md").read_text()
    done = run("bench", "batch", "--methods", "full")
    assert done.code == 2 and "--methods full: it has no adapter" in done.err


TINY = "{num_hidden_layers: 1, hidden_size: 32, intermediate_size: 48, vocab_size: 50, num_attention_heads: 2, "
TINY += "num_key_value_heads: 1}"
QWEN = ("--model", "Qwen/Qwen2-0.5B-Instruct", "--overrides", TINY, "--rounds", "2", "--threads", "1")
GPT2 = ("--model", "openai-community/gpt2-medium")
GPT2 += ("--overrides", "{n_embd: 32, n_layer: 1, n_head: 2, vocab_size: 50, n_positions: 20}")


@pytest.mark.slow
@pytest.mark.parametrize(("stop",), marked(zip([1, 7]), lambda row: row[0] in (7,)))
def test_ctrl_c_leaves_what_is_finished(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    from randlora_pl.lab.bench.steps import Case

    calls: list[str] = []
    plain = Case.seconds

    def seconds(self: Case) -> float:
        calls.append(self.name)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return plain(self)

    monkeypatch.setattr(Case, "seconds", seconds)
    done = run("bench", *SMALL, "--methods", "full", "lora", "randlora", "--rounds", "5")
    assert done.code == 130
    if stop == 1:
        assert not (tmp_path / "runs").exists()
        return
    folder = only(tmp_path / "runs" / "bench-train")
    assert f"the finished results are in {folder.relative_to(tmp_path)}" in done.err
    assert sorted(path.name for path in folder.iterdir()) == FILES and "of 2 interleaved rounds" in done.out
    assert [len(case["seconds"]) for case in json.loads((folder / "bench.json").read_text())["cases"]] == [2, 2, 2]


@pytest.mark.slow
def test_costs_of_adapted_layers_grow(run: Run, tmp_path: Path) -> None:
    points = ("--sweeps", "width", "depth", "--widths", "64", "48", "--depths", "1")
    done = run("bench", "adapters", *points, "--methods", "full", "lora", "randlora", "--rounds", "1", "--threads", "1")
    assert done.code == 0, done.err
    folder = only(tmp_path / "runs" / "bench-adapters")
    assert sorted(path.name for path in folder.iterdir()) == ["bench.csv", *FILES]
    rows = list(csv.DictReader((folder / "bench.csv").read_text().splitlines()))
    assert [(row["sweep"], row["width"]) for row in rows[::3]] == [("width", "48"), ("width", "64"), ("depth", "768")]
    assert "3 points, 3 methods, 1 rounds" in done.out and "width  bases  full fine-tuning" in done.out
    assert len(json.loads((folder / "bench.json").read_text())["rows"]) == 9


@in_one_item(
    ("words", "says"),
    [
        (["train", "--model", "vit_base_patch32_22"], "Did you mean 'vit_base_patch32_224'"),
        (["train", "--rounds", "0"], "--rounds is 0"),
        (["train", "--device", "cuda"], "PyTorch sees no GPU"),
        (["train", "--output", "."], "exists and is not overwritten"),
        (["train", "--model", "test_vit", "--output", "/proc/figures/x"], "cannot be created"),
        (["train", *QWEN, "--dropout", "1"], "dropout is 1.0"),
        (["train", *QWEN[:2], "--overrides", "4"], "--overrides is '4'"),
        (["train", *QWEN[:2], "--overrides", "{hiden_size: 4}"], "error: --overrides: qwen2 has no"),
        (["train", *QWEN[:2], "--overrides", "{hidden_size: a}"], "Field 'hidden_size' expected int, got str"),
        (["train", *QWEN[:2], "--overrides", TINY.replace("32", "30")], "does not give a valid model: hidden_size"),
        (["train", *QWEN[:2], "--overrides", TINY.replace("50", "1")], "vocab_size 1"),
        (["train", "--model", "test_vit", "--overrides", "{hidden_size: 4}"], "--overrides needs a decoder"),
        (["train", *QWEN, "--tokens", "1"], "--tokens is 1"),
        (["train", *GPT2, "--tokens", "21"], "--tokens is 21, and gpt2 has 20 positions"),
        (["trian"], "Did you mean 'train'"),
        (["adapters", "--ranks", "769"], "--ranks: 769 is larger"),
        (["adapters", "--sweeps", "sparsity", "--methods", "lora"], "sparsity is for ternary bases only"),
    ],
)
def test_mistakes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = run("bench", *words)
    assert done.code == 2 and says in done.err and done.err.count("\n") <= 2
    assert not list(tmp_path.iterdir())
