"""Jobs of two processes that differ end soon, and say why."""

import json
import shutil
import socket
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed import TCPStore

from tests.support.cli import SMALL, Run

from .jobs import free_port, outputs, spawn_tasks
from .processes import write_folder

FIT = ["fit", *SMALL, "--run.logger", "none", "--data.shots", "null"]
OPTIONS = {
    "--data.eval_batch_size": "300", "--data.batch_size": "4", "--model.learning_rate": "0.01", "--data.steps": "5",
    "--model.adapter.rank": "7", "--trainer.strategy": "ddp",
}  # fmt: skip


def roots(folder: Path) -> list[str]:
    """Two copies of one dataset."""
    for name in ("one", "two"):
        write_folder(folder / name)
    return [str(folder / name) for name in ("one", "two")]


def both(folder: Path, more: list[list[str]]) -> list[tuple[int, str]]:
    """Exit code and output of two tasks of a job with own words, which must end soon."""
    started = time.monotonic()
    found = outputs(spawn_tasks([[*FIT, "--data.dataset", "folder", *words] for words in more], folder))
    assert time.monotonic() - started < 120
    return found


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_another_option_ends_all_processes(tmp_path: Path, option: str) -> None:
    own, other = ([f"--data.root={root}"] for root in roots(tmp_path))
    for code, text in both(tmp_path, [own, [*other, option, OPTIONS[option]]]):
        assert code == 2 and f"{option} is " in text and "Traceback" not in text, text


@pytest.mark.slow
def test_resuming_in_one_process_only_ends_all(tmp_path: Path) -> None:
    own, other = ([f"--data.root={root}"] for root in roots(tmp_path))
    for code, text in both(tmp_path, [own, [*other, "--resume", "auto"]]):
        assert code == 2 and "come to --resume auto, but process 0 to the run folder" in text, text
    assert not list(tmp_path.glob("runs/*/2*"))


@pytest.mark.slow
@pytest.mark.usefixtures("deep")  # as in processes of their own
def test_testing_other_weights_ends_all(tmp_path: Path, run: Run) -> None:
    assert run(*FIT, "--run.root", str(tmp_path / "runs")).code == 0
    (own,) = tmp_path.glob("runs/*/2*/adapter")
    other = shutil.copytree(own.parent, tmp_path / "other") / "adapter"
    file = other / "adapter.safetensors"
    tensors = {name: 2 * value for name, value in load_file(file).items()}
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata)
    config = json.loads((other / "adapter_config.json").read_text())
    config.pop("sha256", None)
    (other / "adapter_config.json").write_text(json.dumps(config))
    words = [["test", "--adapter", str(folder), "--trainer.accelerator", "cpu"] for folder in (own, other)]
    for code, text in outputs(spawn_tasks(words, tmp_path)):
        assert code == 2 and "the adapter is '" in text and "Traceback" not in text, text


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_picture_ends_all_processes(tmp_path: Path, split: str) -> None:
    own, other = roots(tmp_path)
    removed = sorted((tmp_path / "two").rglob(f"{split}/**/*.png"))[0]
    removed.unlink()
    for code, text in both(tmp_path, [[f"--data.root={own}"], [f"--data.root={other}"]]):
        assert code == 2 and f"the {split} samples differ" in text and removed.name in text, text
        assert "Traceback" not in text


@pytest.mark.slow
def test_other_places_and_workers_are_no_difference(tmp_path: Path) -> None:
    own, other = roots(tmp_path)
    words = [[f"--data.root={own}"], [f"--data.root={other}", "--data.num_workers", "1"]]
    assert [code for code, _ in both(tmp_path, words)] == [0, 0]


@pytest.mark.slow
def test_a_mistake_of_one_process_ends_all(tmp_path: Path) -> None:
    own, _ = roots(tmp_path)
    for code, text in both(tmp_path, [[f"--data.root={own}"], ["--data.root=nowhere"]]):
        assert code == 2 and "nowhere" in text and "Traceback" not in text, text


@pytest.mark.slow
@pytest.mark.parametrize("speaks", [False, True])
def test_a_busy_port_ends_all(tmp_path: Path, speaks: bool) -> None:
    """Of a program that is silent, and of another job's store."""
    own, _ = roots(tmp_path)
    port = free_port()
    held = (
        TCPStore("127.0.0.1", port, None, True, wait_for_workers=False) if speaks else socket.create_server(("", port))
    )
    words = [*FIT, "--data.dataset", "folder", f"--data.root={own}"]
    for code, text in outputs(spawn_tasks([words, words], tmp_path, port)):
        assert code == 2 and f"has port {port}" in text and "Traceback" not in text, text
    assert held
