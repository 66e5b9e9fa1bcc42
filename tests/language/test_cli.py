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
from safetensors.torch import load_file

from randlora_pl.adapters import inject
from randlora_pl.language.loading import model_config
from randlora_pl.language.tasks.causal_lm import CausalLMTask
from randlora_pl.language.tasks.common import load_language_task
from randlora_pl.run.options.shipped import find_config
from tests.support.cli import Refused, Run
from tests.support.products import marked

from .small import SHAPES

SMALL = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--run.logger", "csv")
SHORT = ("--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1")


@pytest.fixture
def words(toy: Path, tokenizer: Path) -> list[str]:
    """A fit of the toy task with a tiny random Qwen2."""
    shape = json.dumps(SHAPES["qwen2"] | {"vocab_size": 64})
    return [
        *("--model", "CausalLMTask", "--model.name", "qwen2", "--model.pretrained", "random"),
        *("--model.config_overrides", shape, "--model.tokenizer", str(tokenizer), "--model.max_new_tokens", "4"),
        *("--model.adapter", "RandLoRA", "--model.adapter.rank", "8", "--model.learning_rate", "1e-2"),
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
    merged = run("adapter", "merge", str(folder / "adapter"), "--output", str(tmp_path / "merged"))
    assert merged.code == 0, merged.err
    from transformers import AutoModelForCausalLM

    task = load_language_task(folder / "adapter")
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(bare(ids).logits, task.model(ids).logits, rtol=1e-4, atol=1e-5)
    assert "exists" in run("adapter", "merge", str(folder / "adapter"), "--output", str(tmp_path / "merged")).err


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(
    run: Run, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = [*words, *SHORT, "--data.steps", "4", "--checkpoint.every_n_steps", "2"]
    assert run("fit", *fits, "--run.name", "whole").code == 0
    losses, calls = CausalLMTask.sample_losses, []

    def interrupted(self: CausalLMTask, batch: dict[str, Any]) -> Any:
        calls.append(self.training)
        if sum(calls) == 4:
            raise KeyboardInterrupt
        return losses(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(CausalLMTask, "sample_losses", interrupted)
        stopped = run("fit", *fits, "--run.name", "part")
    assert stopped.code == 130 and "fit --resume" in stopped.err
    (whole,), (part,) = ((tmp_path / "runs" / name).glob("2*") for name in ("whole", "part"))
    resumed = run("fit", "--resume", str(part))
    assert resumed.code == 0 and "resumed after step 2" in resumed.out
    one, two = (load_file(folder / "adapter" / "adapter.safetensors") for folder in (whole, part))
    assert one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def test_likelihood_without_options_is_refused_before_the_training(
    refused: Refused, words: list[str], tmp_path: Path
) -> None:
    said = refused("fit", *words, "--data.steps", "1", "--model.evaluation", "likelihood", "--run.name", "late")
    assert "likelihood needs questions with options" in said
    assert not list(tmp_path.rglob("adapter*"))


RECORD = {
    "instruction": "Is water wet?\n\nAnswer format: true/false",
    "input": "",
    "output": "the correct answer is true",
}


def write_commonsense(root: Path) -> Path:
    """True copies of the format, a few records each."""
    records = [RECORD | {"answer": "true"}] * 12
    (root / "boolq").mkdir(parents=True)
    (root / "piqa").mkdir()
    (root / "commonsense_15k.json").write_text(json.dumps(records, indent=1))
    (root / "boolq" / "test.json").write_text(json.dumps(records[:3]))
    piqa = {"instruction": "Which?\n\nAnswer format: solution1/solution2", "input": "", "answer": "solution2"}
    piqa["output"] = "the correct answer is solution2"
    (root / "piqa" / "test.json").write_text(json.dumps([piqa] * 2))
    return root


@pytest.mark.parametrize("evaluation", [pytest.param("generate", marks=pytest.mark.full), "likelihood"])
def test_the_shipped_config_runs_with_random_weights(evaluation: str, run: Run, tmp_path: Path) -> None:
    """Qwen2's config on true file formats: accuracy of each test, their mean, and answers that were not found."""
    root = write_commonsense(tmp_path / "data")
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
    assert results["data/train"] == 8 and results["data/val"] == 4 and results["data/test"] == 5
    assert "8 train, 4 val" in shown.out and "2 optimizer steps" in shown.out


COUNTS = {
    "commonsense_qwen2": 5_956_992,
    "commonsense_phi3": 45_712_128,
    "commonsense_llama3": 56_626_112,
    "e2e_gpt2_medium": 5_211_648,
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), marked(COUNTS.items(), lambda row: row[0] == "commonsense_qwen2"))
def test_configs_train_as_many_parameters_as_they_say(name: str, count: int) -> None:
    """Models of the true sizes on the meta device."""
    from transformers import AutoModelForCausalLM

    from randlora_pl.adapters import LoRA, RandLoRA

    text = find_config(name).read_text()
    options: dict[str, Any] = yaml.safe_load(text)["model"]["init_args"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(options["name"], "random", None))
    adapter = RandLoRA(**options["adapter"]["init_args"])
    assert inject(model, adapter, options["targets"]).trainable == count
    assert f"{count:,}" in text
    if name.startswith("e2e"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config(options["name"], "random", None))
        assert inject(model, LoRA(rank=16), options["targets"]).trainable == 5_505_024
        assert "5,505,024" in text


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
    assert "is of texts: it needs --model TextClassificationTask." in refused("fit", "--data.dataset", "rte")
    assert "train.jsonl does not exist" in fit("--data.root", str(tmp_path))
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    assert "train.jsonl, line 2" in fit("--data.root", str(bad))


@pytest.mark.slow  # one of each kind is above
def test_further_mistakes_are_told_in_a_line(refused: Refused, words: list[str], tmp_path: Path) -> None:
    def fit(*more: str) -> str:
        return refused("fit", *words, *more)

    assert "Unknown option --model.beams" in fit("--model.beams", "4")
    said = refused("fit", "--data.dataset", "jsonl")
    assert "is of texts: it needs --model CausalLMTask or TextClassificationTask." in said
    assert "accelerator" not in fit("--model.quantize", "4bit")
    assert "makes no model: " in fit("--model.config_overrides", "{hidden_size: wide}")
    assert "makes no model: " in fit("--model.config_overrides", "{num_attention_heads: 0}")
    assert "cannot be loaded (--model.name)" in fit("--model.pretrained", "null", "--model.config_overrides", "null",
                                                 "--model.name", str(tmp_path / "none"))  # fmt: skip
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    assert "lacks 'completion'" in fit("--data.root", str(bad))
    (bad / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert "leave nothing to train on" in fit("--data.root", str(bad), "--data.validation", "120")


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


def test_weights_that_lack_tensors_are_refused(refused: Refused, words: list[str], tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    whole = tmp_path / "whole"
    config = model_config("qwen2", "random", SHAPES["qwen2"] | {"vocab_size": 64})
    AutoModelForCausalLM.from_config(config).save_pretrained(whole)
    tensors = load_file(whole / "model.safetensors")
    name = next(each for each in tensors if each.endswith("up_proj.weight"))
    del tensors[name]
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    other = ("--model.pretrained", str(whole), "--model.config_overrides", "null")
    assert f"lacks 1 tensors of Qwen2ForCausalLM, such as {name}" in refused("fit", *words, *other)


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
    shown = refused("adapter", "export", str(folder / "adapter"), "--to", "onnx", "--output", "x.onnx")
    assert "belongs to a language model" in shown and "adapter merge" in shown
    shown = refused("adapter", "export", str(folder / "adapter"), "--to", "peft", "--output", "peft")
    assert "train a RandLoRA with --model.adapter.pairing peft" in shown


@pytest.mark.slow
def test_gates_by_dataset_of_an_update_that_is_never_merged(
    run: Run, refused: Refused, words: list[str], tmp_path: Path
) -> None:
    place = words.index("RandLoRA")
    words[place : place + 3] = ["HydraLoRA", "--model.adapter.rank", "4"]
    shown = run("fit", *words, "--data.steps", "4", "--run.name", "toy")
    assert shown.code == 0, shown.err
    (folder,) = (tmp_path / "runs" / "toy").glob("2*")
    header, *rows = (folder / "figures" / "gates.csv").read_text().splitlines()
    assert header.startswith("layer,group,samples,head 1,head 2,head 3") and rows
    for command in (["merge"], ["add", str(folder)], ["export", "--to", "lora", "--rank", "2"]):
        said = refused("adapter", command[0], str(folder), *command[1:], "--output", "no.safetensors")
        assert "(HydraLoRA): the update depends on the input" in said
