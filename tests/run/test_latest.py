"""The link ``latest``: commands take it for the newest run, and no command for one more run."""

import shutil
from pathlib import Path

import pytest
import yaml

from randlora_pl.tasks import VisionLanguageTask
from tests.commands.test_resume import interrupt_at
from tests.support.cli import SMALL, Refused, Run

JOB = [*SMALL, "--run.logger", "none", "--run.name", "job", "--checkpoint.every_n_steps", "1"]


def test_a_run_from_the_latest_of_its_own_name(
    run: Run, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "runs" / "job"
    with monkeypatch.context() as patched:
        patched.setattr(VisionLanguageTask, "training_step", interrupt_at(2))
        assert run("fit", *JOB).code == 130
    first = home / (home / "latest").readlink()
    assert "fit --resume" in refused("predict", "--adapter", "runs/job", "--images", "x.png")
    assert run("fit", *JOB, "--ckpt_path", "runs/job/latest/checkpoints/last.ckpt").code == 0
    second = home / (home / "latest").readlink()
    assert sorted(home.iterdir()) == [first, second, home / "latest"]
    assert yaml.safe_load((second / "config.yaml").read_text())["ckpt_path"] == str(first / "checkpoints" / "last.ckpt")
    assert "is finished" in refused("fit", "--resume", "runs/job")
    # a mistake that is found late leaves the link as it was
    assert "--ckpt_path" in refused("fit", *JOB, "--ckpt_path", "none.ckpt")

    compared = run("compare", *map(str, sorted(home.iterdir())))
    assert compared.code == 0 and "is not finished" in compared.err
    assert "there twice" in refused("compare", "runs/job", str(second))
    tested = run("test", "--run", "runs/job", "--run.logger", "none", "--trainer.accelerator", "cpu")
    assert tested.code == 0 and f"adapter runs/job/{second.name}/adapter on digits" in tested.out
    for name in ("runs/job", "runs/job/latest", "runs/job/latest/adapter"):
        assert f"runs/job/{second.name}/adapter" in run("adapter", "info", name).out
    resumed = run("fit", "--config", "quickstart", "--run.name", "job", "--resume", "auto")
    assert resumed.code == 0 and "resumed after step" in resumed.out + resumed.err
    assert (home / "latest").readlink() == Path(second.name), "the newest run, not the one that goes on"
    assert len(list(home.iterdir())) == 3

    shutil.rmtree(second)
    for words in (["test", "--run", "runs/job/latest"], ["adapter", "info", "runs/job/latest/adapter"]):
        assert f"ln -sfn {first.name} runs/job/latest" in refused(*words)
    assert "ln -sfn" in refused("compare", "runs/job/latest", "runs/job")
