"""The README tells the truth: every command in it runs here, shortened where it would take minutes or a network."""

import json
import os
import re
import shlex
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import open_clip.factory
import pytest
import torch
import yaml
from PIL import Image
from timm.models import vision_transformer

from randlora_pl.cli.main import main
from randlora_pl.config.shipped import find_config
from randlora_pl.data.catalog.registry import find
from tests.data.conftest import cifar_root  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [  # indented lines, then what the sentences mention between backticks
    *(
        re.sub(r"\s+#.*", "", line.partition("randlora-pl ")[2])
        for line in TEXT.splitlines()
        if re.match(r" {4}.*\brandlora-pl [a-z]", line)
    ),
    *re.findall(r"`randlora-pl ([^`]+)`", TEXT),
]
FITS = [command for command in COMMANDS if command.startswith("fit ") and "--resume" not in command]
GETS = [command for command in COMMANDS if command.startswith("data get ")]  # need a network
BENCHES = [command for command in COMMANDS if command.startswith("bench ")]
LONG = ("fit", "predict", "compare-methods", "sweep", "bench", "adapter", "serve")
QUICK = [c for c in COMMANDS if c.split()[0] not in LONG and c not in GETS]
SHORT = [
    *("--data.steps", "2", "--data.batch_size", "4", "--data.eval_batch_size", "4", "--trainer.precision", "32-true"),
    *("--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1", "--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false"),
]


TINY = {
    "commonsense": "{num_hidden_layers: 2, hidden_size: 112, intermediate_size: 128, vocab_size: 300}",
    "glue": "{num_hidden_layers: 2, hidden_size: 64, num_attention_heads: 4, intermediate_size: 128}",
}
"""Shapes of the language models of some configs."""


def texts(folder: Path) -> None:
    """Prompts with completions, and labelled texts."""
    for split in ("train", "val", "test"):
        rows = [{"prompt": f"{number} and one is", "completion": f" {number + 1}"} for number in range(12)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = [f"{word} film {number},{label}" for number in range(6) for word, label in (("fine", 1), ("dull", 0))]
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *lines]) + "\n")


def photos(folder: Path, count: int = 3) -> Path:
    """Images of noise, `count` of them, in a new folder."""
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def run(command: str, *more: str) -> None:
    os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)
    assert main([*shlex.split(command), *more]) == 0, command


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the quickstart has run, with its adapter."""
    folder = tmp_path_factory.mktemp("readme")
    before, threads = Path.cwd(), torch.get_num_threads()
    torch.set_num_threads(1)
    (folder / "configs").symlink_to(ROOT / "configs")
    os.chdir(folder)
    run(FITS[0], *SHORT)
    yield folder
    os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)
    os.chdir(before)
    torch.set_num_threads(threads)


def test_the_readme_has_its_commands() -> None:
    assert FITS[0] == "fit --config configs/quickstart.yaml"
    assert len(FITS) >= 4 and len(QUICK) >= 2
    assert any(c.startswith("predict ") for c in COMMANDS) and any("--resume" in c for c in COMMANDS)


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two architectures of the README with a narrow block or two: commands and data are what is tested."""
    narrow = {"layers": 2, "width": 128}
    config = open_clip.get_model_config("ViT-B-32")
    config["vision_cfg"] |= narrow
    config["text_cfg"] |= narrow | {"heads": 2}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", config)
    plain = vision_transformer._create_vision_transformer

    def create(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        model: torch.nn.Module = plain(name, pretrained, **(options | {"depth": 1, "embed_dim": 128, "num_heads": 2}))
        return model

    monkeypatch.setattr(vision_transformer, "_create_vision_transformer", create)


@pytest.mark.parametrize("command", FITS[1:])
def test_fit(
    command: str,
    quickstart: Path,
    small_models: None,
    tmp_path: Path,
    cifar_root: tuple[Path, object],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    mine = tmp_path / "mine"
    for name in ("cat", "dog"):
        photos(mine / name, 20)
    texts(mine)
    command = command.replace("PATH", str(mine))
    tiny = [("--model.config_overrides", shape) for name, shape in TINY.items() if f"--config {name}" in command]
    if "--data.download true" in command:  # no network: what the download would bring is there already
        command = command.replace("--data.download true", f"--data.root {cifar_root[0]}")
    run(command, *SHORT, "--model.pretrained", "random", *sum(tiny, ()), "--run.root", str(tmp_path / "runs"))
    assert "Next:" in capsys.readouterr().out
    (results,) = tmp_path.glob("runs/*/2*/results.json")
    assert (results.parent / "adapter" / "adapter.safetensors").exists()
    for use in (c for c in COMMANDS if c.startswith("predict ") and c.split()[2].split("/")[1] == results.parts[-3]):
        (mine / "prompts.txt").write_text("2 and one is\n3 and one is\n")
        use = use.replace("PROMPTS.txt", shlex.quote(str(mine / "prompts.txt")))
        run(use.replace("runs/", f"{tmp_path}/runs/", 1), "--output", str(tmp_path / "answers.csv"))
        assert len((tmp_path / "answers.csv").read_text().splitlines()) == 1 + 2


def test_predict_and_resume(quickstart: Path) -> None:
    (folder,) = quickstart.glob("runs/quickstart/2*")
    photos(quickstart / "photos")
    predict, resume = ([c for c in COMMANDS if word in c] for word in ("predict --adapter", "--resume"))
    run(predict[0])
    assert len((quickstart / "predictions.csv").read_text().splitlines()) == 1 + 3
    weights = (folder / "adapter" / "adapter.safetensors").read_bytes()
    shutil.rmtree(folder / "adapter")  # what a crash after the last step leaves
    (folder / "results.json").unlink()
    run(resume[0])
    assert (folder / "adapter" / "adapter.safetensors").read_bytes() == weights


def test_train_export_and_use_elsewhere(quickstart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason='this needs the extra: pip install ".[onnx]"')
    (train,) = (c for c in FITS if "--run.name demo" in c)
    (export,) = (c for c in COMMANDS if c.startswith("adapter export"))
    (code,) = (body for body in re.findall(r"```python\n(.*?)```", TEXT, flags=re.S) if "onnxruntime" in body)
    assert 2 + len(code.splitlines()) == 6
    run(train, *SHORT)
    run(export)
    capsys.readouterr()
    exec(code, {"pixels": np.random.default_rng(0).random((2, 3, 32, 32), dtype=np.float32)})
    assert "'zero', 'one'" in capsys.readouterr().out


SHORT_BENCH = {
    "data": ("--image-size", "16", "--batch-size", "4", "--images", "20", "--rounds", "1", "--workers", "1"),
    "train": ("--model", "test_vit", "--batch-size", "2", "--rounds", "1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", BENCHES)
def test_measurements(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        photos(tmp_path / "mine" / name, 20)
    run(command.replace("PATH", "mine"), *SHORT_BENCH[command.split()[1]])


@pytest.mark.parametrize("command", QUICK)
def test_what_there_is(command: str, quickstart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(command)
    assert len(capsys.readouterr().out.splitlines()) > 3


def test_what_is_downloaded_is_known() -> None:
    assert GETS and all(find(command.split()[2]).download for command in GETS)


def test_compare_methods(quickstart: Path) -> None:
    (command,) = {c for c in COMMANDS if c.startswith("compare-methods") and "--tune" not in c}
    settings = yaml.safe_load(find_config("compare_methods").read_text())
    settings |= {"budgets": [2], "set": {"data.steps": 1, "trainer.limit_val_batches": 0}}
    (quickstart / "short.yaml").write_text(yaml.safe_dump(settings))
    run(command, "--config", "short.yaml", "--seeds", "1", "--methods", "linear probe", "RandLoRA-6", "--output", "out")
    assert "RandLoRA-6" in (quickstart / "out" / "table.md").read_text()


def test_the_sweep(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (command,) = {c for c in COMMANDS if c.startswith("sweep")}
    run(command, "--dry-run")
    assert "327 cells: 327 open" in capsys.readouterr().out


def test_the_python_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = (body for body in re.findall(r"```python\n(.*?)```", TEXT, flags=re.S) if "inject(model" in body)
    linear = torch.nn.Linear
    parts = {"fc1": linear(16, 8), "act": torch.nn.ReLU(), "fc2": linear(8, 16), "head": linear(16, 4)}
    model = torch.nn.Sequential(OrderedDict(parts))
    plain = model.state_dict().keys()
    for name in ("adapter", "merged.pt"):
        code = code.replace(f'"{name}")', f"{str(tmp_path / name)!r})", 1)
    exec(code, {"model": model})
    assert (tmp_path / "adapter" / "adapter.safetensors").exists()
    assert torch.load(tmp_path / "merged.pt").keys() == plain
    assert "124 of 404 parameters train" in capsys.readouterr().out


def test_the_test_command_is_what_continuous_integration_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert '-m venv .venv && .venv/bin/pip install ".[test]" && .venv/bin/pytest' in TEXT
    assert '-m venv .venv && .venv/bin/pip install -q ".[test]"' in script
    assert ".venv/bin/pytest" in script
    assert "fit --config quickstart" in script


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).exists(), target
