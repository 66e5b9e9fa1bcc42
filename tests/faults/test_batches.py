"""A batch that is no number: the run stops before the weights are spoilt, and what was saved stays."""

import json
from pathlib import Path

import torch

from randlora_pl.adapters import read_adapter
from tests.faults.checks import FIT, assert_same, assert_whole, equal, run_of, step_of
from tests.faults.child import run
from tests.faults.faults import Spoil


def test_run_stops_at_a_spoilt_batch_and_goes_on_without_it(tmp_path: Path, undisturbed: Path) -> None:
    """The fifth step; the last checkpoint is that of the fourth, after a validation."""
    ended = run(FIT, tmp_path, Spoil("training", 10))
    folder = run_of(tmp_path)
    assert ended.code == 2, ended
    (line,) = ended.err.strip().splitlines()
    assert "the loss is nan at step 5. Lower --model.learning_rate (now 0.001, try 0.0003)" in line
    assert f"The weights before it are in {folder.relative_to(tmp_path)}/adapter (step 4)." in line
    assert_whole(folder)
    assert step_of(folder) == 4
    kept = read_adapter(folder / "adapter")
    assert kept.config["metadata"]["training"]["stopped"] == "the loss was not finite"
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert equal(kept.tensors, {name.removeprefix("backbone."): value for name, value in checkpoint.items()})
    assert not json.loads((folder / "results.json").read_text()).get("finished")

    again = run(["fit", "--resume", str(folder.relative_to(tmp_path))], tmp_path, Spoil("training", 2))
    assert again.code == 2 and "at step 5" in again.err, "where the cause is still there, it stops there again"
    assert run(["fit", "--resume", str(folder.relative_to(tmp_path))], tmp_path).code == 0
    assert_same(folder, undisturbed)
