import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from randlora_pl.adapters import DoRA, RandLoRA
from randlora_pl.run import run_folder as runs
from randlora_pl.run.options import saved_config as configs
from randlora_pl.run.options.compose import DEFAULTS, compose, planned_name
from randlora_pl.tasks import AdaptationModule
from randlora_pl.utils.errors import UserError
from tests.commands.test_resume import interrupt_at
from tests.support.cli import SMALL, Refused, Run


@pytest.fixture(autouse=True)
def _no_folder_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)


def test_default_name_says_what_is_trained() -> None:
    flat = {"data.dataset": "digits", "model.name": "ViT-B-32", "model.adapter": "randlora_pl.adapters.RandLoRA"}
    assert planned_name(flat) == "digits_vit-b-32_randlora"
    assert planned_name({"model.name": "vit_base.x/y"}) == "digits_y"


def test_folders_are_new_shared_by_the_processes_of_a_job_or_impossible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {runs.new_folder(tmp_path, "a") for _ in range(3)}
    assert len(folders) == 3 and all(folder.is_dir() for folder in folders), "in one second"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        runs.new_folder(tmp_path / "file", "a")
    with pytest.raises(UserError, match="without slashes"):
        runs.new_folder(tmp_path, "a/b")
    first = runs.new_folder(tmp_path, "b")
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "1")
    assert runs.new_folder(tmp_path, "b") == first and len(list((tmp_path / "b").iterdir())) == 1


def test_only_empty_handed_folders_are_removed(tmp_path: Path) -> None:
    made = runs.missing_folders(tmp_path / "deep" / "runs" / "a")
    folder = runs.new_folder(tmp_path / "deep" / "runs", "a")
    (folder / "run.log").write_text("")
    runs.remove_folder(folder, made)
    assert not (tmp_path / "deep").exists()
    (tmp_path / "runs").mkdir()
    made = runs.missing_folders(tmp_path / "runs" / "a")
    runs.remove_folder(runs.new_folder(tmp_path / "runs", "a"), made)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "an empty folder of the user stays"
    folder = runs.new_folder(tmp_path / "runs", "a")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").write_text("")
    runs.remove_folder(folder)
    assert folder.is_dir()


def test_no_run_folder_names_a_run_below(tmp_path: Path) -> None:
    (tmp_path / "a" / "2026-01-01").mkdir(parents=True)
    (tmp_path / "a" / "2026-01-01" / "config.yaml").write_text("")
    with pytest.raises(UserError, match="2026-01-01"):
        configs.check_run(tmp_path)


def test_what_a_checkpoint_depends_on_must_not_change() -> None:
    adapter = {"class_path": "y.RandLoRA", "init_args": {"rank": 6, "alpha": 10.0}}
    model = {"class_path": "x.VisionLanguageTask", "init_args": {"adapter": adapter}}

    def check(words: str) -> None:
        saved = {"model": model, "data": {"classes": "base"}}
        configs.check_architecture(compose("fit", words.split(), DEFAULTS), saved, Path("r"))

    check("--model.adapter.alpha 10 --model.learning_rate 1 --model.adapter.rank 6")
    for words, both in (
        ("--model.adapter.rank 7", "--model.adapter.rank is 7, in the run 6"),
        ("--model.adapter.alpha 5", "--model.adapter.alpha is 5, in the run 10"),
        ("--model.adapter LoRA", "--model.adapter is LoRA, in the run RandLoRA"),
        ("--model TextHeadTask", "--model is TextHeadTask, in the run VisionLanguageTask"),
        ("--data.classes new", "--data.classes is new, in the run base"),
    ):
        with pytest.raises(UserError, match=both):
            check(words)


def test_resolved_config_is_usable_again() -> None:
    tree = {
        "seed_everything": 3,
        "config": [None],
        "ckpt_path": None,
        "model": {"class_path": "T", "init_args": {"learning_rate": None, "seed": 3}},
        "data": {"seed": 3, "crop_scale": [0.5, 1.0]},
    }
    adapter = DoRA(RandLoRA(rank=4, seed=3))
    model = {"learning_rate": 1e-3, "adapter": configs.without_seed(adapter, None)}
    resolved = configs.resolved_config(tree, model, {"epochs": 4})
    assert set(resolved) == {"seed_everything", "model", "data"}
    options = resolved["model"]["init_args"]
    assert options["learning_rate"] == 1e-3 and "seed" not in options
    inner = options["adapter"]["init_args"]["inner"]
    assert inner["init_args"]["rank"] == 4 and inner["init_args"]["seed"] is None
    assert resolved["data"] == {"crop_scale": [0.5, 1.0], "epochs": 4}
    json.dumps(resolved)
    again = configs.resolved_config(tree | {"ckpt_path": "a.ckpt"}, {}, {})
    assert again["ckpt_path"] == str(Path.cwd() / "a.ckpt")


@pytest.mark.parametrize("seed", [None, 3])
def test_given_seeds_stay_in_the_resolved_config(seed: int | None) -> None:
    given = {"class_path": "RandLoRA", "init_args": {"seed": seed}}
    assert configs.without_seed(RandLoRA(seed=3), given).seed == seed
    inner = configs.without_seed(DoRA(RandLoRA(seed=3)), {"class_path": "DoRA", "init_args": {"inner": given}}).inner
    assert inner.seed == seed


def test_older_configs_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for text in ("1", "2"):
        file.write_text(text)
        configs.keep_older(file)
        assert file.read_text() == text, "a copy, so that the run can be resumed at any moment"
    assert [(tmp_path / f"config.yaml.{n}").read_text() for n in (1, 2)] == ["1", "2"]


def test_resume_auto_finds_a_run_of_the_same_command_or_an_unfinished_one(tmp_path: Path) -> None:
    assert runs.run_to_resume(tmp_path, "job", "mine") is None
    one, other = '{"finished": true, "command": "mine"}', '{"finished": true, "command": "other"}'
    for name, results in {"1": None, "2": "{}", "3": one, "4": other, "5": '{"finished": true}'}.items():
        folder = tmp_path / "job" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
        if results is not None:
            (folder / "results.json").write_text(results)
    for command, name in {"mine": "3", "other": "4", "new": "2"}.items():
        assert runs.run_to_resume(tmp_path, "job", command) == tmp_path / "job" / name
    (tmp_path / "job" / "4" / "results.json").write_text("[" * 100_000)
    assert runs.run_to_resume(tmp_path, "job", "mine") == tmp_path / "job" / "4", "resumed, it reports the damage"


JOB = [*SMALL, "--run.logger", "none", "--run.name", "job", "--checkpoint.every_n_steps", "1"]


def test_a_run_from_the_latest_of_its_own_name(
    run: Run, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "runs" / "job"
    with monkeypatch.context() as patched:
        patched.setattr(AdaptationModule, "training_step", interrupt_at(2))
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
    assert "given twice" in refused("compare", "runs/job", str(second))
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
