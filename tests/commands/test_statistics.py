"""A model with running statistics is saved whole: what `fit` measured is what its files give."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from randlora_pl.adapters import read_adapter
from randlora_pl.interop.onnx import load_program
from randlora_pl.utils.run_files import read_results
from tests.support.cli import Run

METHODS = ("FullFineTuning", "BitFit")


@pytest.mark.parametrize(
    ("name", "size", "method"),
    [
        ("test_resnet", "32", "FullFineTuning"),
        pytest.param("test_efficientnet", "32", "BitFit", marks=pytest.mark.full),
        *(
            pytest.param(name, "64", method, marks=pytest.mark.slow)
            for name in ("resnet18", "efficientnet_b0", "swiftformer_xs")
            for method in METHODS
        ),
    ],
)
def test_a_saved_model_gives_the_figures_of_its_run(
    name: str, size: str, method: str, run: Run, tmp_path: Path
) -> None:
    fit = run(
        *("fit", "--model", "LinearHeadTask", "--model.name", name, "--model.pretrained", "random"),
        *("--model.adapter", method, "--model.img_size", size, "--model.learning_rate", "1e-3", "--run.name", "bn"),
        *("--data.dataset", "digits", "--data.batch_size", "32", "--data.steps", "4", "--data.flip", "false"),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    )
    assert fit.code == 0, fit.err
    (folder,) = (tmp_path / "runs/bn").glob("2*")
    assert run("test", "--run", str(folder)).code == 0
    (again,) = (tmp_path / "runs/bn-test").glob("2*")
    before, after = read_results(folder), read_results(again)
    assert [before[key] for key in ("test/acc", "test/loss")] == [after[key] for key in ("test/acc", "test/loss")]

    file = read_adapter(folder / "adapter")
    kept = {key: file.tensors[key] for key in file.kept if file.tensors[key].is_floating_point()}
    assert kept
    info = run("adapter", "info", str(folder / "adapter"))
    assert "kept without a gradient" in info.out
    assert run("adapter", "merge", str(folder / "adapter"), "--output", "m.safetensors").code == 0
    merged = load_file("m.safetensors")
    program = load_program(folder / "adapter").module.state_dict()
    for key, value in kept.items():
        assert torch.equal(merged[key], value)
        assert torch.equal(program[f"encoder.tower.{key}"], value)
