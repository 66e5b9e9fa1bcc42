"""Language tasks through the command line: the same run folder, and mistakes in one or two lines."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from randlora_pl.adapters import inject
from randlora_pl.language.tokenization import model_config
from randlora_pl.run.options.shipped import find_config
from tests.support.cli import Refused, Run

from .files import write_commonsense
from .small import SHAPES, typed

SMALL = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--run.logger", "csv")
SHORT = ("--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1")


@pytest.fixture
def words(toy: Path, tokenizer: Path) -> list[str]:
    """A fit of the toy task with a tiny random Qwen2."""
    return [
        *(*typed(tokenizer), "--model.max_new_tokens", "4", "--model.learning_rate", "1e-2"),
        *("--data.dataset", "jsonl", "--data.root", str(toy), "--data.mask_prompt", "true", *SMALL),
    ]


@pytest.mark.slow
def test_a_fit_learns_the_toy_instruction(run: Run, words: list[str], tmp_path: Path) -> None:
    """New questions are answered, and everything about the run is where that of an image run is."""
    shown = run("fit", *words, "--data.steps", "400", "--run.name", "toy", "--run.logger", "tensorboard")
    assert shown.code == 0, shown.err
    (folder,) = (tmp_path / "runs" / "toy").glob("2*")
    results = json.loads((folder / "results.json").read_text())
    assert results["test/acc"] > 0.9 and results["test/unfound"] == 0
    assert results["finished"] and results["steps"] == 400 and results["samples_per_second"] > 0
    assert results["base/library"] == "transformers" and "version/transformers" in results
    assert {"val/loss", "val/acc", "peak_memory_bytes", "trainable_parameters"} <= results.keys()
    for line in (
        "1,260 train, 90 val, 90 test samples",
        "are longer than 256 tokens",
        "400 optimizer steps",
        "(CausalLMTask)",
    ):
        assert line in shown.out
    assert {"adapter", "adapter-best", "checkpoints", "config.yaml", "run.log", "tensorboard"} <= {
        file.name for file in folder.iterdir()
    }
    assert "class_path: randlora_pl.language.CausalLMTask" in (folder / "config.yaml").read_text()
    tested = run("test", "--run", str(folder), "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu")
    assert tested.code == 0 and f"accuracy {100 * results['test/acc']:.2f} %" in tested.out
    info = run("adapter", "info", str(folder / "adapter"))
    assert "transformers qwen2 random" in info.out and "not shown" not in info.out


@pytest.mark.parametrize("evaluation", [pytest.param("generate", marks=pytest.mark.full), "likelihood"])
def test_the_shipped_config_runs_with_random_weights(evaluation: str, run: Run, tmp_path: Path) -> None:
    """Qwen2's config on true file formats: accuracy of each test, their mean, and answers that were not found."""
    root = write_commonsense(tmp_path / "data", 3)
    shape = json.dumps(SHAPES["qwen2"] | {"vocab_size": 260})
    shown = run(
        "fit", "--config", "commonsense_qwen2", "--model.pretrained", "random", "--model.config_overrides", shape,
        "--data.root", str(root), "--data.tests", "[boolq,piqa]", "--data.validation", "4", "--data.steps", "2",
        "--trainer.precision", "32-true", "--run.name", "smoke", "--model.evaluation", evaluation, *SMALL,
    )  # fmt: skip
    assert shown.code == 0, shown.err
    (folder,) = (tmp_path / "runs" / "smoke").glob("2*")
    results = json.loads((folder / "results.json").read_text())
    tests = [results[f"test/acc/{name}"] for name in ("boolq", "piqa")]
    assert results["test/acc"] == pytest.approx(sum(tests) / 2)
    assert (results["test/unfound"] == 0) == (evaluation == "likelihood")  # 258 random bytes say nothing
    assert results["data/train"] == 20 and results["data/val"] == 4 and results["data/test"] == 6
    assert "20 train, 4 val" in shown.out and "2 optimizer steps" in shown.out


@pytest.mark.parametrize("name", ["commonsense_qwen2", "e2e_gpt2_medium", "glue_roberta_base", "glue_roberta_large"])
def test_the_small_shape_that_a_config_names_takes_its_adapter(name: str) -> None:
    """For trying it without weights; the rank must fit into the smallest layer."""
    from transformers import AutoModel, AutoModelForCausalLM

    from randlora_pl.adapters import RandLoRA

    text = find_config(name).read_text()
    (shape,) = re.findall(r"--model.config_overrides '(.*)'", text)
    options: dict[str, Any] = yaml.safe_load(text)["model"]["init_args"]
    kind: Any = AutoModel if name.startswith("glue") else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(model_config(options["name"], "random", yaml.safe_load(shape)))
    assert inject(model, RandLoRA(**options["adapter"]["init_args"]), options["targets"]).trainable > 0


def test_mistakes_are_told_in_a_line(refused: Refused, words: list[str], tmp_path: Path) -> None:
    def fit(*more: str) -> str:
        return refused("fit", *words, *more)

    assert "Did you mean 'jsonl'" in fit("--data.dataset", "jsnl")
    assert "'CausalLMTsk'" in refused("fit", "--model", "CausalLMTsk")
    assert "Unknown option --data.shots. It is one of images. All options" in fit("--data.shots", "4")
    told = "Unknown option --data.max_length. It is one of labelled texts; here --data.cutoff."
    assert told in fit("--data.max_length", "5")
    assert "num_beams: expected a whole number from 1 to 1,000" in fit("--model.num_beams", "0")
    assert "qwen2 has no 'hidden'. Did you mean" in fit("--model.config_overrides", "{hidden: 4}")
    odd = SHAPES["qwen2"] | {"vocab_size": 64, "hidden_size": 60}
    told = fit("--model.config_overrides", json.dumps(odd))
    assert "num_attention_heads" in told and "RuntimeError" in told
    assert "makes no model: " in fit("--model.config_overrides", "{hidden_size: wide}")
    gone = ("--model.name", str(tmp_path / "none"), "--model.pretrained", "null", "--model.config_overrides", "null")
    assert "cannot be loaded (--model.name)" in fit(*gone)
    assert "accelerator" not in fit("--model.quantize", "4bit")
    assert "a positive number, not 0" in fit("--model.adam_eps", "0")
    for dataset, task in (("rte", ""), ("jsonl", "CausalLMTask or ")):
        said = refused("fit", "--data.dataset", dataset)
        assert f"is of texts: it needs --model {task}TextClassificationTask." in said
    assert "train.jsonl does not exist" in fit("--data.root", str(tmp_path))
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    assert "train.jsonl, line 2" in fit("--data.root", str(bad))


def test_a_run_without_a_test_and_a_validation_says_so(run: Run, words: list[str], toy: Path, tmp_path: Path) -> None:
    """The run of `test_predict_says_that_it_takes_images` has both."""
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy(toy / "train.jsonl", own)
    late = ("--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", "3")
    shown = run("fit", *words, *SHORT, *late, "--data.root", str(own), "--data.steps", "2")
    assert shown.code == 0, shown.err
    assert "adapter merge" in shown.out and "randlora-pl test" not in shown.out
    assert "; none to test (no test.jsonl" in shown.out.replace("\n", " ")
    assert "none: --trainer.val_check_interval is 3, and the run has 2 batches" in shown.out


@pytest.mark.slow
def test_an_evaluation_of_nothing_says_where_texts_come_from(
    run: Run, refused: Refused, words: list[str], toy: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy(toy / "train.jsonl", own)
    shown = run("fit", *words, "--data.root", str(own), "--data.steps", "1", "--trainer.limit_val_batches", "1",
                "--run.name", "run")  # fmt: skip
    assert shown.code == 0, shown.err
    (folder,) = (tmp_path / "runs" / "run").glob("2*")
    told = refused("test", "--run", str(folder))
    again = f"randlora-pl validate --run {folder}"
    assert f"has no samples for it. Add {own}/test.jsonl, or use the validation samples: {again}" in told
    assert run(*again.split()[1:], *SMALL).code == 0
    told = refused("validate", "--run", str(folder), "--data.validation", "0")
    assert f"Add {own}/val.jsonl, or hold out training samples in fit with --data.validation N" in told
    told = refused("test", "--run", str(folder), "--data.root", str(own / "train.jsonl"))
    assert f"Add {own}/test.jsonl and give --data.root {own}, or" in told


def test_a_wrong_test_is_told_before_the_training(
    refused: Refused, words: list[str], toy: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(toy, tmp_path / "own")  # other tests share the toy
    with (own / "test.jsonl").open("a") as file:
        file.write("{}\n")
    assert "test.jsonl" in refused("fit", *words, "--data.root", str(own), "--data.steps", "1")
    assert not (tmp_path / "runs").exists()


def test_the_missing_extra_is_told(refused: Refused, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "transformers" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    for name in ("tokenizers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "'.[language]'" in refused("fit", *words)


def test_predict_says_that_it_takes_images(run: Run, refused: Refused, words: list[str], tmp_path: Path) -> None:
    each = ("--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", "1")
    fit = run("fit", *words, *SHORT, *each, "--data.steps", "1", "--run.name", "one")
    assert fit.code == 0 and "validation     1 time on " in fit.out
    assert "randlora-pl test" in fit.out and "none to test" not in fit.out
    (folder,) = (tmp_path / "runs" / "one").glob("2*")
    place = folder.relative_to(tmp_path) / "adapter"
    assert f"randlora-pl predict --adapter {place} --texts FILE --output predictions.csv" in fit.out
    assert f"randlora-pl adapter merge {place} --output FOLDER" in fit.out
    (tmp_path / "images").mkdir()
    shown = refused("predict", "--adapter", str(folder / "adapter"), "--images", "images")
    assert "belongs to a language model" in shown
