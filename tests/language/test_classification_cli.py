"""Classification of texts through the command line: runs, resumed runs, merged folders, and mistakes."""

import json
from pathlib import Path

import pytest
import torch

from randlora_pl.language.tasks.common import load_language_task
from tests.support.cli import Refused, Run

from .classify import TYPED, write_csv, write_reviews
from .files import write_glue
from .test_cli import SMALL


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A fit of the toy task with a tiny random RoBERTa."""
    return [
        *(*TYPED, "--model.learning_rate", "1e-2", "--data.dataset", "csv"),
        *("--data.root", str(write_reviews(tmp_path / "data")), "--data.batch_size", "8", *SMALL),
    ]


def test_a_run_is_as_any_other_and_its_merged_folder_classifies_by_itself(
    run: Run, words: list[str], tmp_path: Path
) -> None:
    shown = run("fit", *words, "--data.steps", "80", "--checkpoint.monitor", "val/score", "--run.name", "toy")
    assert shown.code == 0, shown.err
    (folder,) = (tmp_path / "runs" / "toy").glob("2*")
    results = json.loads((folder / "results.json").read_text())
    assert results["test/acc"] == results["test/score"] > 0.9
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
def test_the_shipped_config_runs_with_random_weights(dataset: str, names: set[str], run: Run, tmp_path: Path) -> None:
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


def test_mistakes_are_told_in_a_line(refused: Refused, run: Run, words: list[str], tmp_path: Path) -> None:
    def fit(*more: str) -> str:
        return refused("fit", *words, *more)

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
