"""The teacher task: what is planted, that no run changes it, and that a student learns it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from randlora_pl.adapters import Adapter, FullFineTuning, LoRA, RandLoRA
from randlora_pl.data import ImageData
from randlora_pl.interop.base_model import site_weights
from randlora_pl.lab.report.collect import read_sweep
from randlora_pl.lab.teacher import POWERS, TeacherTask, mean_spectrum, planted
from randlora_pl.tasks import AdaptationModule, load_task, make_trainer
from randlora_pl.utils.errors import UserError
from tests.lab.report.language import write_language_sweep
from tests.support.cli import Refused
from tests.tasks.small import two_blocks

LAYERS = [f"visual.transformer.resblocks.{block}.{name}" for block in (0, 1)
          for name in ("attn.in_proj", "mlp.c_fc", "mlp.c_proj")]  # fmt: skip
PATH = "randlora_pl.lab.teacher.TeacherTask"


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with two_blocks():
        yield


def built(adapter: Adapter | None = None, **options: Any) -> TeacherTask:
    task = TeacherTask("tiny", "random", adapter=adapter or LoRA(rank=1), **options)
    task.adapt()
    return task.eval()


def updates(task: TeacherTask) -> dict[str, Tensor]:
    """What was planted, by layer; all else is as in the base model."""
    teacher, base = task._towers
    weights, before = site_weights(teacher, LAYERS), site_weights(base, LAYERS)
    changed = {name for name, value in teacher.state_dict().items() if not torch.equal(value, base.state_dict()[name])}
    assert len(changed) == len(weights) == len(LAYERS)
    return {layer: weights[layer] - before[layer] for layer in LAYERS}


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spectrum", POWERS)
def test_the_planted_update_has_the_spectrum_and_size(spectrum: str) -> None:
    task = built(spectrum=spectrum, size=0.5)
    before = site_weights(task._towers[1], LAYERS)
    for layer, update in updates(task).items():
        values = torch.linalg.svdvals(update.double())
        assert values.norm() == pytest.approx(0.5 * before[layer].norm().item(), rel=1e-5)
        torch.testing.assert_close(
            values / values[0], torch.arange(1, 193, dtype=torch.float64) ** POWERS[spectrum], rtol=1e-3, atol=1e-5
        )


def test_a_full_fine_tuning_gives_its_mean_spectrum(tmp_path: Path) -> None:
    full = built(FullFineTuning())
    weights, sizes = site_weights(full.model, LAYERS), torch.linspace(1, 4, len(LAYERS))
    for layer, size in zip(LAYERS, sizes, strict=True):  # flat ones of several sizes, and one that falls
        values = torch.arange(1, 193).double() ** (-1.0 if layer == LAYERS[0] else 0.0)
        with torch.no_grad():
            weights[layer] += planted(weights[layer], values, float(size), 7, layer)
    folder = full.save(tmp_path / "full")
    values = torch.linalg.svdvals(updates(built(spectrum=str(folder)))[LAYERS[3]].double())
    shape = torch.arange(1, 193).double() ** -1
    expected = shape / shape.norm() + (len(LAYERS) - 1) * 192**-0.5
    torch.testing.assert_close(values / values[0], expected / expected[0], rtol=1e-2, atol=1e-5)


def test_a_mean_spectrum_is_stretched_to_other_widths() -> None:
    assert mean_spectrum([torch.tensor([3.0, 1.0]), torch.tensor([30.0, 10.0])], 3).tolist() == pytest.approx(
        [value / 14**0.5 for value in (3, 2, 1)]
    )


def test_no_method_and_no_seed_of_a_run_changes_the_teacher() -> None:
    first, other = updates(built(seed=1)), updates(built(RandLoRA(rank=6), seed=2))
    torch.set_num_threads(2)  # `conftest.py` takes it back
    threads = updates(built(FullFineTuning(), seed=1))
    for layer in LAYERS:
        assert torch.equal(first[layer], other[layer]) and torch.equal(first[layer], threads[layer])
    assert not torch.equal(first[LAYERS[0]], updates(built(teacher_seed=1))[LAYERS[0]])


@pytest.mark.slow  # imports PyTorch again
def test_another_process_plants_the_same_bits() -> None:
    code = (
        "import torch; from randlora_pl.lab.teacher import planted; torch.set_num_threads(2);"
        "from randlora_pl.utils import rng\nwith rng.seeded(0):\n"
        " print(planted(torch.ones(48, 32), torch.ones(32), 1.0, 3, 'x').flatten().tolist())"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert text.strip() == str(planted(torch.ones(48, 32), torch.ones(32), 1.0, 3, "x").flatten().tolist())


def test_a_student_with_the_teachers_weights_has_loss_zero() -> None:
    task = built(FullFineTuning())
    at_start = task.class_logits(images())
    assert (at_start[:, 0] > 1e-5).all()
    torch.testing.assert_close(at_start[:, 0], at_start[:, 1])
    task.model.load_state_dict(task._towers[0].state_dict())
    task.model.train()  # the same, in a training without the base model
    for outputs in (task.class_logits(images()), task.train().class_logits(images())):
        torch.testing.assert_close(outputs[:, 0], torch.zeros(3), rtol=0, atol=1e-10)
    share, weight = task.compared(at_start * torch.tensor([0.25, 1.0]), torch.zeros(3))
    assert share.tolist() == pytest.approx([0.75] * 3, rel=1e-4) and torch.equal(weight, at_start[:, 1])


def test_a_fit_lowers_the_loss_on_unseen_images_and_loads_again(tmp_path: Path) -> None:
    task = TeacherTask("tiny", "random", adapter=LoRA(rank=6), learning_rate=1e-2, spectrum="i^-1")
    trainer = make_trainer(accelerator="cpu", limit_test_batches=1)
    data = ImageData(dataset="digits", steps=6, batch_size=16, eval_batch_size=32)
    (before,) = trainer.test(module := AdaptationModule(task), data, verbose=False)
    trainer.fit(module, data)
    (after,) = trainer.test(module, data, verbose=False)
    assert abs(before["test/score"]) < 1e-4 and after["test/loss"] < 0.9 * before["test/loss"]
    assert after["test/score"] == pytest.approx(1 - after["test/loss"] / before["test/loss"], abs=1e-5)
    folder = task.save(tmp_path / "adapter")
    assert not any("teacher" in name or "base" in name for name in task.state_dict())
    loaded = load_task(folder)  # without --import
    assert isinstance(loaded, TeacherTask)
    torch.testing.assert_close(loaded.class_logits(images()), task.eval().class_logits(images()))


def test_wrong_spectra_and_sizes_are_refused(refused: Refused, tmp_path: Path) -> None:
    words = ("fit", "--config", "tiny_clip", "--model", PATH, "--data.steps", "1")
    assert "'bad': give flat, i^-0.5, i^-1 or a run" in refused(*words, "--model.spectrum", "bad")
    with pytest.raises(UserError, match="a positive number"):
        TeacherTask("tiny", size=0.0)
    lora = built(LoRA(rank=2)).save(tmp_path / "lora")
    with pytest.raises(UserError, match="lora was trained with LoRA"):
        built(spectrum=str(lora))
    unchanged = built(FullFineTuning()).save(tmp_path / "unchanged")
    with pytest.raises(UserError, match="changes no matrix"):
        built(spectrum=str(unchanged))
    with pytest.raises(UserError, match="absent"):
        built(spectrum=str(tmp_path / "absent"))


def test_a_report_compares_shares_also_below_zero(tmp_path: Path) -> None:
    results = {"finished": True, "method": "LoRA", "metric": "score", "test/loss": 0.1}
    cells = {("15k", "LoRA-16", seed): results | {"test/score": score} for seed, score in ((1, 0.25), (2, -1.5))}
    sweep = read_sweep(write_language_sweep(tmp_path / "sweep", cells))
    assert sorted(sweep.finished["accuracy"]) == [-150, 25] and sweep.measured == "score"
