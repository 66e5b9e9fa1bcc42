"""Every public name has an example in its docstring, or in its package's, and the examples run."""

import copy
import doctest
import importlib
import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from randlora_pl.adapters import LoRA, RandLoRA, inject, save_adapter
from randlora_pl.data.catalog import CATALOG
from randlora_pl.tasks import VisionLanguageTask
from tests.docs.pages import ROOT
from tests.support.products import in_one_item, marked

PACKAGES = (
    *("adapters", "lab.analysis", "run.callbacks", "data", "lab", "interop", "language", "models", "prompts", "tasks"),
    *("callbacks", "testing"),
)
MODULES = {name: importlib.import_module(f"randlora_pl.{name}") for name in PACKAGES}
NAMES: dict[str, Any] = {name: getattr(module, name) for module in MODULES.values() for name in module.__all__}
ADDED = {  # base classes, and what `fit` and others add or return
    *("HeldLock", "NonFiniteLoss", "StartSummary", "StepNumbers", "Termination", "WrittenAnswers", "ZeroShot"),
    *("Adapter", "DeltaWeight", "Objective", "ImageTask", "ImageSpec", "LoadedClip", "LoadedVit", "ModelIdentity"),
    "ModelRow",
    *("PromptLearner", "Prompts"),
    *("LayerSpectrum", "ProgressBar", "load_tokenizer", "ContractError"),
    "import_official",  # its file comes from other code
}


class Checker(doctest.OutputChecker):
    """Compares what is shown; where nothing is shown, a path or a log may be printed."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples_of(package: str) -> dict[str, str]:
    """The docstrings with examples of a package, by name."""
    module = MODULES[package]
    found = {package: module.__doc__ or "", **{name: getattr(module, name).__doc__ or "" for name in module.__all__}}
    return {name: text for name, text in found.items() if ">>>" in text and "Built-in" not in text}


def prepare(folder: Path) -> dict[str, Any]:
    """Write the files of the examples to a folder; return their names."""
    model = timm.create_model("test_vit", num_classes=10)
    methods = {name: RandLoRA(rank=6, seed=len(name)) for name in ("runs/cars/adapter", "pets.safetensors")}
    for name, method in {**methods, "runs/lora/adapter": LoRA(rank=2)}.items():
        adapted = copy.deepcopy(model)
        inject(adapted, method)
        save_adapter(adapted, folder / name)
    for seed, name in enumerate(("one", "two")):
        task = VisionLanguageTask("tiny", seed=seed)
        task.set_classes(CATALOG["digits"].classnames, CATALOG["digits"].templates)
        task.adapt()
        task.save(folder / "runs" / name / "adapter")
    shutil.copytree(ROOT / "docs" / "results" / "offline", folder / "sweep")
    for name in ("photos", "prompts", "films"):
        (folder / name).mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
    for split in ("train", "val", "test"):
        rows = [{"prompt": f"{number} and one is", "completion": f" {number + 1}"} for number in range(12)]
        (folder / "prompts" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = [f"{word} film {number},{label}" for number in range(6) for word, label in (("fine", 1), ("dull", 0))]
        (folder / "films" / f"{split}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    size = model.default_cfg["input_size"]
    made = {"images": torch.randn(2, *size), "labels": torch.tensor([0, 1]), "digits": torch.rand(2, 3, 32, 32)}
    return {"torch": torch, "Path": Path, "randlora_pl": importlib.import_module("randlora_pl"), "model": model} | made


def failures(name: str, text: str, names: dict[str, Any]) -> str:
    """What goes wrong when the examples of a docstring run, each docstring with a new model."""
    names = NAMES | names | {"model": copy.deepcopy(names["model"])}
    test = doctest.DocTestParser().get_doctest(text, names, name, name, 0)
    output = io.StringIO()
    runner = doctest.DocTestRunner(Checker(), verbose=False, optionflags=OPTIONS)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        runner.run(test, out=output.write)
    return output.getvalue()


@pytest.mark.parametrize(("package",), marked(zip(PACKAGES), lambda row: row[0] == "data", pytest.mark.slow))
def test_examples_run(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if package == "language":
        pytest.importorskip("transformers", reason='this needs the extra: pip install ".[language]"')
    monkeypatch.chdir(tmp_path)
    names = prepare(tmp_path)
    assert not "".join(failures(name, text, names) for name, text in examples_of(package).items())


@pytest.mark.slow
def test_the_example_of_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit = importlib.import_module("randlora_pl").fit
    assert not failures("fit", fit.__doc__, {"randlora_pl": importlib.import_module("randlora_pl"), "model": None})


@in_one_item("package", PACKAGES)
def test_public_names_have_examples(package: str) -> None:
    shown = examples_of(package)
    without = [
        name
        for name in MODULES[package].__all__
        if name not in ADDED and name not in shown and name not in shown.get(package, "")
    ]
    assert not without


def test_an_example_that_is_wrong_is_found() -> None:
    assert "Expected" in failures("x", ">>> 1 + 1\n3\n", {"model": None})
