"""Run folders that were saved once are tested, resumed and used for predictions.

`saved/images` and `saved/texts` are runs that Ctrl-C stopped in the ninth of twelve steps (the checkpoint is of the
fifth), with the adapter and predictions that the same run had at its end when nothing stopped it. Run logs, figures and
all that differs between machines were left out.
"""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from tests.support.cli import Run

pytestmark = pytest.mark.usefixtures("deep")
SAVED = Path(__file__).parent / "saved"
OPTIONS = ("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu")
TENSORS = "adapter/adapter.safetensors"
KINDS = {
    "images": ("accuracy 14.72 %, loss 2.9939", ["tasks.VisionLanguageTask", "adapters.DoRA", "adapters.RandLoRA"]),
    "texts": ("accuracy 0.00 %, without an answer 0.00 %", ["language.CausalLMTask", "adapters.LoRA"]),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "texts":
        pytest.importorskip("transformers", reason="pip install '.[language]'")
    return str(request.param)


@pytest.fixture
def saved(kind: str, run: Run) -> str:
    """A copy of the run folder in the current, empty folder, and what its config needs beside it."""
    shutil.copytree(SAVED / kind, kind)
    shutil.copytree(SAVED / "sentences", "sentences")
    return kind


def class_paths(folder: str) -> list[str]:
    return re.findall(r"class_path: randlora_pl\.(\S+)", (Path(folder) / "config.yaml").read_text())


def test_a_run_is_tested(saved: str, run: Run) -> None:
    tested = run("test", "--run", saved, *OPTIONS)
    assert tested.code == 0, tested.err
    assert KINDS[saved][0] in tested.out


def test_a_run_is_resumed_to_the_same_weights(saved: str, run: Run) -> None:
    resumed = run("fit", "--resume", saved, *OPTIONS)
    assert resumed.code == 0, resumed.err
    # Since then weight decay leaves the magnitudes of DoRA alone, so that the last steps end a little elsewhere.
    shown = KINDS[saved][0].replace("2.9939", "2.9917")
    assert "resumed after step 5" in resumed.out and shown in resumed.out
    there, here = load_file(SAVED / saved / TENSORS), load_file(Path(saved) / TENSORS)
    assert there.keys() == here.keys()
    names = [name for name in sorted(there) if "magnitude" not in name]
    first, second = (torch.cat([tensors[name].flatten() for name in names]) for tensors in (there, here))
    assert (first - second).norm() < 1e-3 * first.norm()
    assert class_paths(saved) == KINDS[saved][1]


def test_an_adapter_predicts_the_same(saved: str, run: Run) -> None:
    Path("d").mkdir()
    for number, pixels in enumerate(load_digits().images[:4]):
        Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(f"d/{number}.png")
    what = ("--images", "d") if saved == "images" else ("--texts", "sentences/test.jsonl")
    predicted = run("predict", "--adapter", f"{saved}/adapter", *what, "--device", "cpu", "--output", "here.csv")
    assert predicted.code == 0, predicted.err
    there, here = (list(csv.reader(Path(f).read_text().splitlines())) for f in (f"{saved}/predictions.csv", "here.csv"))
    assert len(there) == len(here) > 4
    for old, new in zip(there, here, strict=True):
        numbers = [place for place, cell in enumerate(old) if re.fullmatch(r"0\.\d+", cell)]
        assert [cell for place, cell in enumerate(old) if place not in numbers] == [
            cell for place, cell in enumerate(new) if place not in numbers
        ]
        assert [float(new[place]) for place in numbers] == pytest.approx(
            [float(old[place]) for place in numbers], abs=1e-3
        )


def test_the_saved_files_are_small_and_name_no_place() -> None:
    files = [file for file in SAVED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 400_000
    for file in files:
        assert not re.search(rb"/(home|root|tmp|usr|Users)/", file.read_bytes()), file
