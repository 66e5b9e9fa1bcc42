"""A training that starts where a LoRA has ended (``fit --from-adapter``)."""

import json
import os
import re
import shlex
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from randlora_pl.adapters import HiRA
from randlora_pl.commands.main import main
from randlora_pl.run.session import find_lora, resume_by_itself
from randlora_pl.tasks import AdaptationModule
from randlora_pl.utils.errors import UserError
from tests.commands.test_resume import _ctrl_c_works_again, interrupt_at, weights  # noqa: F401
from tests.support.cli import SMALL, Refused, Run
from tests.support.products import marked
from tests.tasks.small import built, two_blocks

LORA = ["--model.adapter", "LoRA", "--model.adapter.rank", "2", "--model.adapter.alpha", "8"]
STAGE = ["--model.adapter.rank", "12", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
STAGE += ["--trainer.limit_test_batches", "1", "--trainer.limit_val_batches", "0", "--run.root", "runs"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a LoRA."""
    root = tmp_path_factory.mktemp("lora")
    os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)
    with two_blocks():
        assert main(["fit", *SMALL, *LORA, "--model.learning_rate", "0.02", "--run.root", str(root)]) == 0
    os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)
    return next((root / "quickstart").glob("2*"))


def only_run(name: str) -> Path:
    (folder,) = Path("runs", name).glob("2*")
    return folder


def results(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results.json").read_text()))


@pytest.mark.parametrize(
    ("form", "batch"),
    marked(product(["beside", "absorbed"], [1, 3]), lambda row: row == ("beside", 3)),
)
def test_starts_exactly_and_resumes_to_the_same_bits(
    form: str, batch: int, run: Run, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the first checkpoint, which is of batch 2, and after it."""
    own, elsewhere = tmp_path / "lora", tmp_path / "elsewhere"
    shutil.copytree(lora, own)
    before = results(own)
    words = ["fit", "--from-adapter", "lora", "--from-form", form, *STAGE]
    watched = ["--unseen_gradient.every_n_steps", "1"] * (form == "beside")
    shown = run(*words, "--data.steps", "1", "--model.learning_rate", "1e-12", "--run.name", "start", *watched)
    assert shown.code == 0, shown.err
    start = results(only_run("start"))
    assert start["test/loss"] == pytest.approx(before["test/loss"], rel=1e-5)
    assert start["test/loss"] != pytest.approx(before["zeroshot/loss"], rel=1e-2)
    assert start["zeroshot/loss"] == before["zeroshot/loss"] and start["data/shots"] == before["data/shots"] == 2
    assert start["method"] == {"beside": "Together", "absorbed": "RandLoRA"}[form]
    assert ("unseen_gradient/share" in start) == bool(watched), "the LoRA that is kept is a part of the model"
    assert (start["from/adapter"], start["from/form"]) == (str(own / "adapter"), form)
    assert len(start["from/sha256"]) == 64
    config = yaml.safe_load((only_run("start") / "config.yaml").read_text())
    assert (config["from_adapter"], config["from_form"]) == (str(own / "adapter"), form)
    assert "starts where the LoRA" in shown.out

    train = [*words, "--data.steps", "4", "--checkpoint.every_n_steps", "2", "--model.adapter.dropout", "0.1"]
    assert run(*train, "--run.name", "whole").code == 0
    whole = only_run("whole")
    with monkeypatch.context() as patched:
        patched.setattr(AdaptationModule, "training_step", interrupt_at(batch))
        assert run(*train, "--run.name", "cut").code == 130
    if batch == 3:  # the checkpoint has all of it
        own.rename(elsewhere)
    else:  # the LoRA itself is needed
        file = only_run("cut") / "results.json"
        kept = file.read_text()
        file.write_text(kept.replace(start["from/sha256"], "0" * 64))
        changed = run("fit", "--resume", "runs/cut")
        assert changed.code == 2 and "has changed since this run began" in changed.err, changed.err
        file.write_text(kept)
    assert run("fit", "--resume", "runs/cut").code == 0
    assert weights(only_run("cut")) == weights(whole)
    assert results(only_run("cut"))["from/sha256"] == start["from/sha256"]
    if own.exists():
        own.rename(elsewhere)
    assert run("test", "--run", str(whole)).code == 0  # without the LoRA
    assert results(only_run("whole-test"))["test/loss"] == results(whole)["test/loss"]
    again = run("fit", "--config", str(whole / "config.yaml"), "--run.name", "again")
    assert again.code == 2 and f"There is no adapter folder or file {own}" in again.err


def test_a_lora_of_images_with_another_mean_is_refused(
    run: Run, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the test without an adapter, and by a dry run."""
    shutil.copytree(lora, tmp_path / "lora")
    file = tmp_path / "lora/adapter/adapter_config.json"
    content = json.loads(file.read_text())
    content["metadata"]["training"]["frame"]["mean"] = [0.5, 0.4, 0.3]
    file.write_text(json.dumps({name: value for name, value in content.items() if name != "sha256"}))
    monkeypatch.setattr(AdaptationModule, "test_step", lambda *_: pytest.fail("it was evaluated"))
    for more in ([], ["--dry-run"]):
        refused = run("fit", "--from-adapter", "lora", *STAGE, "--data.steps", "1", *more)
        assert refused.code == 2 and "with mean (0.5, 0.4, 0.3), and the model has" in refused.err
    assert not Path("runs").exists()


def test_a_trained_head_goes_on(run: Run) -> None:
    words = [*LORA, "--model", "LinearHeadTask", "--model.head_learning_rate", "0.3", "--model.learning_rate", "0.02"]
    assert run("fit", *SMALL, *words, "--run.root", "runs", "--run.name", "lora").code == 0
    start = ["fit", "--from-adapter", "runs/lora", *STAGE, "--data.steps", "1", "--model.learning_rate", "1e-12"]
    assert run(*start, "--model.head_learning_rate", "1e-12", "--run.name", "next").code == 0
    before, after = (results(only_run(name)) for name in ("lora", "next"))
    assert after["test/loss"] == pytest.approx(before["test/loss"], rel=1e-5)
    assert after["method"] == "Together" and after["task"] == "LinearHeadTask"
    assert after["head_learning_rate"] == 1e-12 != before["head_learning_rate"]


def test_a_name_is_looked_up_once(run: Run, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may have the name of its LoRA, and is the newest of this name as soon as it exists."""
    shutil.copytree(lora, tmp_path / "runs" / "name" / "2026-01-01_00-00-00")
    words = ["--from-adapter", "runs/name", *STAGE, "--run.name", "name", "--data.steps", "1"]
    first = find_lora("runs/name")
    begun = tmp_path / "runs" / "name" / "2026-01-02_00-00-00"
    begun.mkdir()
    shutil.copy(lora / "config.yaml", begun)
    with pytest.raises(UserError, match="is not finished and has no tested adapter yet"):
        find_lora("runs/name")
    with monkeypatch.context() as other:
        other.setenv("LOCAL_RANK", "1")
        assert find_lora("runs/name") == first
    assert resume_by_itself(["--resume", "auto", *words]) == ["--resume", str(begun.relative_to(tmp_path))]

    shutil.rmtree(begun)
    monkeypatch.chdir(first.parent)  # which has a checkpoint
    shown = run("fit", "--from-adapter", "adapter", *STAGE, "--data.steps", "1", "--run.name", "inside")
    assert shown.code == 0 and "starts where the LoRA" in shown.out, shown.err
    assert results(only_run("inside"))["method"] == "Together"


REFUSED = {  # words, of which START stands for those of a stage from a LoRA of VisionLanguageTask
    "--from-adapter linear --config quickstart": "LoRA of LinearHeadTask, not of VisionLanguageTask. Remove --model or",
    "START --model PromptTask": "LoRA of VisionLanguageTask, not of PromptTask. Remove --model or the config that sets",
    "START --model linearheadtask": "LoRA of VisionLanguageTask, not of LinearHeadTask. Remove --model",
    "--from-adapter nowhere": "There is no adapter folder or file nowhere",
    "--from-adapter hira": "is HiRA, and a stage can only start from LoRA",
    "START --resume {lora}": "--resume uses the run's own checkpoint. Remove --from-adapter",
    "START --ckpt_path {lora}/checkpoints/last.ckpt": "--ckpt_path continues a run",
    "START --from-form besides": "--from-form is 'besides'. Did you mean 'beside'? Set beside or absorbed",
    "--config quickstart --from-form absorbed": "--from-form needs a LoRA",
    "START --model.name ViT-B-32": "or train a LoRA of it first: randlora-pl fit --config CONFIG --model.name ViT-B-32",
    "START --seed_everything 3": "--model.pretrained and --seed_everything",  # random weights depend on it
    "START --model.targets [qkv]": "Remove --model.targets: the LoRA's own are the default",
    "START --model.adapter.qkv split": "add --model.adapter.qkv packed",
    "START --from-form absorbed --model.adapter HiRA --model.adapter.rank 2": "RandLoRA, or --from-form beside",
    "START --from-form absorbed --model.adapter.num_bases 1": "has 1 bases. Lower the rank of RandLoRA, or keep the",
    "--from-adapter {lora} --model.adapter FullFineTuning": "FullFineTuning trains the model's own tensors",
}


def test_what_cannot_be_refined_is_refused(refused: Refused, lora: Path, tmp_path: Path) -> None:
    built("vision-language", adapter=HiRA(rank=2)).save(tmp_path / "hira")
    built("linear head", "lora").save(tmp_path / "linear")
    told = {}
    for words, message in REFUSED.items():
        words = words.replace("START", f"--from-adapter {lora} {' '.join(STAGE)}").format(lora=lora)
        told[message] = refused("fit", *words.split()).replace("\n", " ")
    told["test does not support --from-adapter"] = refused("test", "--from-adapter", str(lora))
    assert {message: text for message, text in told.items() if message not in text} == {}


ENDS: dict[str, tuple[list[str], str, str]] = {
    "ranks": (["--model.adapter.rank", "3"], "LoRA", "rank"),
    "bases": (["--model.adapter.select", "bases", "--model.adapter.rank", "48"], "RandLoRA", "num_bases"),
}


@pytest.mark.parametrize("select", ["ranks", pytest.param("bases", marks=pytest.mark.full)])
def test_what_is_found_trains_on_all_samples(select: str, run: Run, tmp_path: Path) -> None:
    typed, method, option = ENDS[select]
    shown = run("fit", *SMALL, "--config", "autolora", *typed, "--run.name", "search")
    assert shown.code == 0, shown.err
    assert "20 train" in shown.out and "6 of train for the search" in shown.out
    (folder,) = tmp_path.glob("runs/search/2*")
    results = json.loads((folder / "results.json").read_text())
    assert (results["data/search"], results["learning_rate"]) == (6, 3e-4)
    fragment = yaml.safe_load((folder / "ranks.yaml").read_text())["model"]["init_args"]
    found = fragment["adapter"]["init_args"][option]
    assert fragment["adapter"] == results["search/adapter"] and fragment["adapter"]["class_path"] == method
    assert results["search/mean"] == pytest.approx(sum(found.values()) / len(found)) and len(found) == 12
    command = re.search(r"randlora-pl (fit --config \S+ --config \S+ranks.yaml)", shown.out.replace("\n", " "))
    assert command is not None, shown.out
    assert command[1] in (folder / "ranks.yaml").read_text()
    after = run(*shlex.split(command[1]), "--run.name", "found")
    assert after.code == 0, after.err
    assert f"{method} rank" in after.out and "by 12 patterns" in after.out
    (second,) = tmp_path.glob("runs/found/2*")
    trained = json.loads((second / "results.json").read_text())
    assert trained["method"] == method and trained["learning_rate"] == 1e-3 and "data/search" not in trained
    assert not (second / "ranks.yaml").exists()
