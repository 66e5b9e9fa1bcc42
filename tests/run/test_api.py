"""Runs from Python."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

import randlora_pl
from randlora_pl.adapters import Adapter, DoRA, Frozen, LoRA, RandLoRA, Together
from randlora_pl.run import api
from randlora_pl.run.lightning_cli import App
from randlora_pl.run.session import prepare
from randlora_pl.utils.errors import DryRunEnd, UserError
from randlora_pl.utils.run_files import read_results
from tests.support.cli import SMALL, Run

DIFFERENT = ("seconds", "per_second", "memory", "time", "command")


class Kept(LoRA):
    """A method in a module that can be imported."""


def test_fit_gives_the_run_of_the_command_line(run: Run) -> None:
    assert run("fit", *SMALL, "--model.adapter", "LoRA", "--model.adapter.rank", "3").code == 0
    (typed,) = Path("runs").glob("*/2*")
    os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)
    options = dict(zip((word.removeprefix("--") for word in SMALL[2::2]), SMALL[3::2], strict=True))
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)  # as its import does
    made = randlora_pl.fit("quickstart", options, {"model": {"adapter": "LoRA"}}, {"model.adapter.rank": 3})
    assert logging.getLogger("lightning.pytorch").level == logging.WARNING
    assert made.folder != typed and made.results["finished"]
    figures = [{k: v for k, v in r.items() if not any(word in k for word in DIFFERENT)}
               for r in (made.results, read_results(typed))]  # fmt: skip
    assert figures[0].items() == figures[1].items()
    assert made.task.adapter.options()["rank"] == 3 and made.data.row.name == "digits"
    files = [folder / "adapter" / "adapter.safetensors" for folder in (made.folder, typed)]
    assert made.adapter == files[0].parent and files[0].read_bytes() == files[1].read_bytes()


NESTED = DoRA(LoRA(rank={"mlp": 2}, alpha=3.0, dropout=0.1, qkv="split"))


@pytest.mark.parametrize("adapter", [Together([LoRA(rank=2), RandLoRA(rank=3)]), NESTED, Frozen(), Kept(rank=2)])
def test_an_adapter_object_is_a_method_with_all_of_its_options(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: Callable[[], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    prepared: list[Adapter] = []

    def built(words: list[str]) -> None:
        command = prepare("fit", words)
        app = App(command, dry=True)
        prepared.append(app.task.adapter)
        raise DryRunEnd

    monkeypatch.setattr(api, "run_fit", built)
    with pytest.raises(DryRunEnd):
        randlora_pl.fit("quickstart", {"model.adapter": "VeRA", "model.adapter.rank": 5}, adapter=adapter)
    made, given = (json.dumps(each.describe()) for each in (prepared[0], adapter))
    assert made.replace('"seed": 0', '"seed": null') == given  # the run's seed


def test_an_adapter_that_a_run_could_not_save_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrong: list[tuple[Any, str]] = [
        (type("Local", (LoRA,), {})(rank=2), "top level"),
        ("LoRA", "give a method such as"),
    ]
    for adapter, message in wrong:
        with pytest.raises(UserError, match=message):
            randlora_pl.fit("quickstart", adapter=adapter)
    assert not list(tmp_path.iterdir())


def test_a_typo_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="steps"):
        randlora_pl.fit("quickstart", {"data.stpes": 3})
    assert not list(tmp_path.iterdir())


OBJECTIVE = """
from lightning.pytorch.cli import LightningCLI
from randlora_pl.data import ImageData
from randlora_pl.tasks import AdaptationModule, VisionLanguageTask

words = ["fit", "--model.objective", "VisionLanguageTask", "--model.objective.adapter", "LoRA"]
words += ["--model.objective.adapter.rank", "3", "--data.dataset", "digits", "--data.steps", "1"]
words += ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
words += ["--trainer.use_distributed_sampler", "false", "--trainer.limit_val_batches", "0"]
words += ["--trainer.max_epochs", "1", "--data.batch_size", "4"]
cli = LightningCLI(AdaptationModule, ImageData, save_config_callback=None, args=words)
print(cli.trainer.global_step, cli.model.objective.adapter)
"""


class Module:
    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter


class Defaulting:
    def __init__(self, adapter: Adapter = LoRA(rank=3)) -> None:  # noqa: B008 (frozen)
        self.adapter = adapter


def parsed(kind: type, *words: str) -> Adapter:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "model")
    adapter: Adapter = parser.instantiate(parser.parse_args([*words])).model.adapter
    return adapter


def test_an_option_is_an_adapter_by_its_class_name() -> None:
    adapter = parsed(Module, "--model.adapter", "RandLoRA", "--model.adapter.rank", "4")
    assert isinstance(adapter, RandLoRA) and adapter.options() == RandLoRA(rank=4).options()
    inner = ["--model.adapter", "DoRA", "--model.adapter.inner", "RandLoRA", "--model.adapter.inner.rank", "4"]
    assert parsed(Module, *inner).options() == DoRA(RandLoRA(rank=4)).options()
    parts = "[{class_path: LoRA, init_args: {rank: 2}}, {class_path: RandLoRA}]"
    together = parsed(Module, "--model.adapter", "Together", "--model.adapter.parts", parts)
    assert together.options() == Together([LoRA(rank=2), RandLoRA()]).options()


def test_a_default_can_be_changed() -> None:
    assert parsed(Defaulting).options() == LoRA(rank=3).options()
    assert parsed(Defaulting, "--model.adapter.alpha", "4").options() == LoRA(rank=3, alpha=4.0).options()
    assert isinstance(parsed(Defaulting, "--model.adapter", "RandLoRA"), RandLoRA)


@pytest.mark.slow
def test_lightnings_own_command_line_trains_an_objective() -> None:
    done = subprocess.run([sys.executable, "-c", OBJECTIVE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("1 LoRA(rank=3")
