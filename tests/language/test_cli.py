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
from randlora_pl.language.tasks.common import load_language_task
from randlora_pl.language.tokenization import model_config
from randlora_pl.run.options.shipped import find_config
from tests.support.cli import Refused, Run

from .classify import TYPED, write_csv, write_reviews
from .files import write_commonsense, write_e2e, write_glue
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
    assert "does not give a valid model: " in fit("--model.config_overrides", "{hidden_size: wide}")
    assert "accelerator" not in fit("--model.quantize", "4bit")
    assert "a positive number, not 0" in fit("--model.adam_eps", "0")
    for dataset, task in (("rte", ""), ("jsonl", "CausalLMTask or ")):
        said = refused("fit", "--data.dataset", dataset)
        assert f"is a dataset of texts: it needs --model {task}TextClassificationTask." in said
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
    assert "[language]'" in refused("fit", *words)


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


@pytest.fixture
def reviewing(tmp_path: Path) -> list[str]:
    """A fit of the toy task with a tiny random RoBERTa."""
    return [
        *(*TYPED, "--model.learning_rate", "1e-2", "--data.dataset", "csv"),
        *("--data.root", str(write_reviews(tmp_path / "data")), "--data.batch_size", "8", *SMALL),
    ]


def test_a_classifier_s_run_is_as_any_other_and_its_merged_folder_classifies_by_itself(
    run: Run, reviewing: list[str], tmp_path: Path
) -> None:
    shown = run("fit", *reviewing, "--data.steps", "9", "--checkpoint.monitor", "val/score", "--run.name", "toy")
    assert shown.code == 0, shown.err
    (folder,) = (tmp_path / "runs" / "toy").glob("2*")
    results = json.loads((folder / "results.json").read_text())
    assert results["test/acc"] == results["test/score"]
    assert {"test/matthews", "test/f1", "test/loss", "val/acc", "best/val/score", "data/cut_train"} <= results.keys()
    assert results["adapter_parameters"] == 1920 and results["trainable_parameters"] == 1920 + 32 * 32 + 32 + 66
    for line in ("2 classes (negative, positive), 131 train, 20 val, 41 test samples", "adapter 1,920, head 1,122"):
        assert line in shown.out
    assert (folder / "figures" / "confusion.png").is_file()
    tested = run("test", "--run", str(folder), *SMALL[:4])
    assert tested.code == 0 and f"accuracy {100 * results['test/acc']:.2f} %" in tested.out
    info = run("adapter", "info", str(folder / "adapter"))
    assert "1,122 of a head" in info.out and "2: negative, positive" in info.out and "not shown" not in info.out
    merged = tmp_path / "merged"
    wrote = run("adapter", "merge", str(folder / "adapter"), "--output", str(merged))
    assert wrote.code == 0 and "AutoModelForSequenceClassification.from_pretrained" in wrote.out, wrote.err
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    bare = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    assert bare.config.id2label == {0: "negative", 1: "positive"}
    texts = ["a great film", "an awful, awful play"]
    batch = AutoTokenizer.from_pretrained(merged)(texts, padding=True, return_tensors="pt")
    found = bare(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.softmax(1)
    torch.testing.assert_close(found, load_language_task(folder / "adapter").classify(texts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        ("cola", {"matthews", "acc", "f1"}),
        pytest.param("stsb", {"pearson", "spearman", "combined"}, marks=pytest.mark.full),
    ],
)
def test_the_config_of_glue_runs_with_random_weights(dataset: str, names: set[str], run: Run, tmp_path: Path) -> None:
    write_glue(tmp_path / "data")
    shown = run(
        "fit", "--config", "glue_roberta_base", *TYPED[4:8], "--data.root", str(tmp_path / "data"), "--data.dataset",
        dataset, "--model.adapter.rank", "8", "--data.steps", "2", "--trainer.precision", "32-true", "--run.name",
        "smoke", *SMALL,
    )  # fmt: skip
    assert shown.code == 0, shown.err
    (folder,) = (tmp_path / "runs" / "smoke").glob("2*")
    results = json.loads((folder / "results.json").read_text())
    figures = [name.removeprefix("test/") for name in results if name.startswith("test/")]
    of_classes = {"balanced_accuracy", "macro_f1", "smallest_class", "largest_class"} if "acc" in names else set()
    of_classes |= {"right"} if of_classes else set()
    assert set(figures) == names | {"score", "loss"} | of_classes
    assert (folder / "test_per_class.csv").is_file() is bool(of_classes)
    assert results["data/metric"] == figures[0] and results["test/score"] == results[f"test/{figures[0]}"]
    assert results["learning_rate"] == 1e-4


def test_mistakes_of_classifiers_are_told_in_a_line(
    refused: Refused, run: Run, reviewing: list[str], tmp_path: Path
) -> None:
    def fit(*more: str) -> str:
        return refused("fit", *reviewing, *more)

    assert "Did you mean 'sst2'" in fit("--data.dataset", "sst")
    told = "Unknown option --data.cutoff. It is one of prompts and completions; here --data.max_length."
    assert told in fit("--data.cutoff", "4")
    assert "Unknown option --model.num_beams" in fit("--model.num_beams", "4")
    assert "SST-2/train.tsv" in fit("--data.dataset", "sst2")
    write_csv(tmp_path / "data" / "test.csv", [("a", "none")])
    write_csv(tmp_path / "data" / "train.csv", [])
    assert "train.csv has no record" in fit()


def test_the_data_sets_are_listed(run: Run) -> None:
    assert "--model TextClassificationTask with sst2, mrpc" in run("datasets").out
    assert "https://gluebenchmark.com/tasks" in run("datasets", "rte").out


@pytest.mark.slow
def test_e2e_from_training_to_merged_weights(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without METEOR, whose program reads its tables for many seconds."""
    monkeypatch.setattr("randlora_pl.language.metrics.meteor", lambda *_: (None, "METEOR needs Java: install it"))
    root = write_e2e(tmp_path / "data", more=2)
    shown = run(
        "fit", "--config", "e2e_gpt2_medium", "--data.root", str(root), "--model.pretrained", "random",
        "--model.config_overrides", json.dumps(SHAPES["gpt2"] | {"vocab_size": 260}), "--data.epochs", "1",
        "--model.num_beams", "2", "--model.max_new_tokens", "4", "--model.learning_rate", "0.1",
        "--model.warmup_steps", "0", "--run.name", "one", *SMALL,
    )  # fmt: skip
    assert shown.code == 0, shown.err
    (folder,) = (tmp_path / "runs" / "one").glob("2*")
    results = json.loads((folder / "results.json").read_text())
    figures = {key for key in results if key.startswith("test/")}
    assert figures == {"test/BLEU", "test/NIST", "test/ROUGE-L", "test/CIDEr"} and "METEOR" in shown.err
    assert results["finished"] and results["data/test"] == 4
    assert f"answers: {folder.relative_to(tmp_path) / 'answers.jsonl'} (4)" in shown.out
    tested = run("test", "--run", str(folder), *SMALL[:4])
    assert tested.code == 0 and "answers:" in tested.out and "BLEU" in tested.out, tested.err
    info = run("adapter", "info", str(folder / "adapter"))
    assert "not shown" not in info.out and "targets         q" in info.out
    merged = run("adapter", "merge", str(folder / "adapter"), "--output", str(tmp_path / "merged"))
    assert merged.code == 0, merged.err
    from transformers import AutoModelForCausalLM

    bare, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), torch.arange(3, 20)[None]
    expected = load_language_task(folder / "adapter").model(ids).logits
    torch.testing.assert_close(bare(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_targets_that_are_left_out_are_the_paper_s(toy: Path, run: Run, tmp_path: Path) -> None:
    """The config says what was taken, the adapter file, too, and both can be used again."""
    from randlora_pl.language.tasks.common import TARGETS

    shown = run(
        "fit", *typed("bytes", "phi3", 260), *SMALL, "--model.max_new_tokens", "4", "--data.dataset", "jsonl",
        "--data.root", str(toy), "--data.steps", "1", "--trainer.limit_val_batches", "0",
        "--trainer.limit_test_batches", "1", "--run.name", "one",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    (folder,) = (tmp_path / "runs" / "one").glob("2*")
    wanted = TARGETS["phi3"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["targets"] == wanted
    saved: dict[str, Any] = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert saved["targets"] == wanted and saved["metadata"]["arguments"]["targets"] == wanted
    assert (folder / "answers.jsonl").read_text().count('"right": ') == 16  # those of one batch
    again = run("test", "--adapter", str(folder / "adapter"), "--trainer.limit_test_batches", "1", *SMALL)
    assert again.code == 0, again.err
