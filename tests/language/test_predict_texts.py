"""``predict --texts``: answers, classes and scores from adapter files alone are those of the run's own test."""

import contextlib
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any, get_type_hints
from unittest.mock import Mock

import pytest
import torch

from randlora_pl.adapters import Adapter, BitFit, FullFineTuning, RandLoRA
from randlora_pl.commands.main import main
from randlora_pl.language.prompt_sets import instruction_prompt
from randlora_pl.language.tasks.causal_lm import CausalLMTask
from randlora_pl.language.tasks.classification import TextClassificationTask
from randlora_pl.language.tasks.common import TextTask, load_language_task
from tests.support.cli import Refused, Run

from . import classify
from .classify import write_csv, write_reviews, write_scores
from .files import record, write_commonsense, write_e2e
from .small import make, typed, write_toy
from .test_cli import SMALL


def fitted(root: Path, *words: str) -> Path:
    """The folder of a short run, which prints nothing that could be taken for predictions."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["fit", *words, *SMALL, "--run.root", str(root), "--run.name", "one"]) == 0
    return next((root / "one").glob("2*"))


def decoder(root: Path, data: Path, tokenizer: Path | str, *words: str, kind: str = "qwen2", size: int = 64) -> Path:
    """A short run of a tiny decoder whose answers have moved far from those of random weights."""
    given = ("--data.root", str(data), "--trainer.limit_val_batches", "0")
    return fitted(root, *typed(tokenizer, kind, size), *given, *words)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy task with fewer tests, all of which are answered again and again."""
    return write_toy(tmp_path_factory.mktemp("toy"), 24)


@pytest.fixture(scope="module")
def repeater(toy: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the toy prompts, tested with beams; to be read only."""
    return decoder(
        tmp_path_factory.mktemp("repeater"), toy, tokenizer, "--data.dataset", "jsonl", "--data.steps", "2",
        "--data.mask_prompt", "true", "--model.max_new_tokens", "4", "--model.num_beams", "2",
        "--model.learning_rate", "1e-3",
    )  # fmt: skip


@pytest.fixture(scope="module")
def critic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the toy reviews; to be read only."""
    root = tmp_path_factory.mktemp("critic")
    words = ("--data.dataset", "csv", "--data.root", str(write_reviews(root / "data")), "--data.max_length", "24")
    length = ("--data.batch_size", "8", "--data.steps", "8", "--model.learning_rate", "1e-2")
    return fitted(root, *classify.TYPED, *words, *length)


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().split("\n")[:-1]]


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def predicted(run: Run, folder: Path, *words: str) -> list[dict[str, str]]:
    shown = run("predict", "--adapter", str(folder / "adapter"), "--output", "-", *words)
    assert shown.code == 0, shown.err
    return read(shown.out)


# What decoders write


@pytest.mark.parametrize("batch", ["7", *(pytest.param(size, marks=pytest.mark.full) for size in ("1", "16", "200"))])
def test_answers_are_those_of_the_test_whatever_the_batch(run: Run, repeater: Path, toy: Path, batch: str) -> None:
    """The test file of the training is taken as it is; what the run searched with is what is searched with."""
    rows = predicted(run, repeater, "--texts", str(toy / "test.jsonl"), "--batch-size", batch)
    tested = answers(repeater)
    assert [(row["prompt"], row["written"]) for row in rows] == [(row["prompt"], row["written"]) for row in tested]
    assert len(rows) == 24 and len({row["written"] for row in rows}) > 3


def test_the_forms_of_a_file_say_the_same(
    run: Run, repeater: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [row["prompt"] for row in answers(repeater)][:9]
    expected = [(row["prompt"], row["written"]) for row in answers(repeater)][:9]
    lines = "\n\n".join(prompts) + "\r\n"  # empty lines are left out
    (tmp_path / "p.txt").write_text(lines, newline="")
    write_csv(tmp_path / "p.csv", [("x, y", prompt) for prompt in prompts], ("completion", "prompt"))
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": prompt} for prompt in prompts]))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    shown = run("predict", "--adapter", str(repeater / "adapter"), "--texts", "p.txt", "p.csv", "p.json", "-")
    assert shown.code == 0, shown.err
    assert "predictions.csv: 36 prompts, at most 4 tokens after each" in shown.out
    rows = read((tmp_path / "predictions.csv").read_text())
    assert [(row["prompt"], row["written"]) for row in rows] == expected * 4


def test_loaded_tasks_have_their_class() -> None:
    assert get_type_hints(load_language_task)["return"] is TextTask
    for kind, other in ((CausalLMTask, "classify"), (TextClassificationTask, "write")):
        with pytest.raises(NotImplementedError):
            getattr(kind, other)(Mock(spec=kind), [])


def test_a_prompt_is_answered_once_however_often_it_is_there(repeater: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_language_task(repeater / "adapter")
    generate, rows = task.model.generate, []
    monkeypatch.setattr(
        task.model, "generate", lambda **given: rows.append(len(given["input_ids"])) or generate(**given)
    )
    prompts = ["red old", "repeat the last word: tall wet dry answer:", "red old", "blue", "red old"]
    texts = task.write(prompts)
    assert rows == [3] and len(set(texts)) == 3
    assert texts == [task.write([prompt])[0] for prompt in prompts]
    assert task.write([]) == []


def test_prompts_of_commonsense_have_their_template(run: Run, tmp_path: Path) -> None:
    data = write_commonsense(tmp_path / "data", 3)
    folder = decoder(
        tmp_path / "runs", data, "bytes", "--data.dataset", "commonsense_15k", "--data.steps", "3", "--data.tests",
        "[boolq,piqa]", "--data.validation", "4", "--model.learning_rate", "0.05", "--model.max_new_tokens", "5",
        size=260,
    )  # fmt: skip
    tested = answers(folder)
    expected = [row["written"] for row in tested]
    files = [str(data / name / "test.json") for name in ("boolq", "piqa")]
    (tmp_path / "one.txt").write_text("Is water wet?\n")
    *rows, line = predicted(run, folder, "--texts", *files, str(folder / "answers.jsonl"), "one.txt")
    rows, whole = rows[: len(tested)], rows[len(tested) :]
    assert [row["written"] for row in rows] == expected and rows[0]["prompt"] == record("boolq", 0)["instruction"]
    # the prompts of answers have the template already
    assert whole == [{"prompt": row["prompt"], "written": row["written"]} for row in tested]
    task = load_language_task(folder / "adapter")
    assert [line["written"]] == task.write([instruction_prompt("Is water wet?")]) != task.write(["Is water wet?"])


def chats(root: Path) -> Path:
    """Conversations to train on, some with a system, and to test with, all of two questions."""
    root.mkdir()
    for split, numbers in (("train", range(24)), ("test", range(24, 30))):
        with (root / f"{split}.jsonl").open("w") as file:
            for number in numbers:
                words = [f"{number}+1", f"{number + 1}", f"{number}+2", f"{number + 2}"]
                roles = ["user", "assistant"] * 2
                if number % 2:
                    roles, words = ["system", *roles], ["Count.", *words]
                turns = [{"role": role, "content": text} for role, text in zip(roles, words, strict=True)]
                file.write(json.dumps({"messages": turns}) + "\n")
    return root


def test_answers_of_conversations_are_those_of_the_test(
    run: Run, refused: Refused, repeater: Path, tmp_path: Path
) -> None:
    """The test file as it is, answers.jsonl, and questions alone; a line of text is a message of the user."""
    data = chats(tmp_path / "data")
    folder = decoder(
        tmp_path / "runs", data, "bytes", "--data.steps", "20", "--model.learning_rate", "0.05",
        "--model.max_new_tokens", "5", size=260,
    )  # fmt: skip
    results = json.loads((folder / "results.json").read_text())
    assert (results["data/dataset"], results["data/mask_prompt"], results["data/test"]) == ("chat", True, 6)
    tested = answers(folder)
    assert len(tested) == 6 and tested[1]["messages"][0] == {"role": "system", "content": "Count."}
    expected = [(row["messages"][-1]["content"], row["written"]) for row in tested]
    files = [str(data / "test.jsonl"), str(folder / "answers.jsonl")]
    rows = predicted(run, folder, "--texts", *files)
    assert [(row["prompt"], row["written"]) for row in rows] == expected * 2
    (tmp_path / "one.txt").write_text("24+1\n")
    (tmp_path / "two.jsonl").write_text('{"prompt": "24+1"}\n')
    alone = predicted(run, folder, "--texts", "one.txt", "two.jsonl")
    task = load_language_task(folder / "adapter")
    messages = [{"role": "user", "content": "24+1"}]
    assert [row["written"] for row in alone] == task.write([messages]) * 2
    same = [messages, "user: 24+1<|end|>assistant: ", [*messages, {"role": "assistant", "content": "9"}]]
    assert task.write(same) == task.write([messages]) * 3
    made = run("adapter", "export", str(folder / "adapter"), "--to", "lora", "--rank", "16", "--output", "as/lora")
    assert made.code == 0, made.err
    as_lora = load_language_task(tmp_path / "as" / "lora")
    shown = run("predict", "--adapter", "as/lora", "--texts", "one.txt", "--output", "-")
    (row,) = read(shown.out)  # it is asked in the template, too
    assert row["written"] == as_lora.write([messages])[0] != as_lora.write(["24+1"])[0]
    base = ("predict", "--adapter", str(folder / "adapter"), "--texts")
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n{"messages": "a"}\n')
    assert "bad.jsonl, line 2: 'messages' must be a list" in refused(*base, "bad.jsonl")
    (tmp_path / "end.txt").write_text("fine\n24<|end|>\n")
    assert "prompt 2, message 1: the text has <|end|>" in refused(*base, "end.txt")
    other = ("predict", "--adapter", str(repeater / "adapter"), "--texts", files[0])
    assert "test.jsonl, line 1: 'messages' is for models that were trained on conversations" in refused(*other)


@pytest.mark.slow
def test_meanings_of_e2e_are_those_of_its_test(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end of text behind each, one paragraph of each answer, and the references of test.txt left out."""
    monkeypatch.setattr("randlora_pl.language.metrics.meteor", lambda *_: (None, "METEOR needs Java: install it"))
    data = write_e2e(tmp_path / "data", more=2)
    folder = decoder(
        tmp_path / "runs", data, "bytes", "--data.dataset", "e2e", "--data.epochs", "2", "--model.learning_rate", "0.1",
        "--model.max_new_tokens", "9", "--model.no_repeat_ngram", "3", kind="gpt2", size=260,
    )  # fmt: skip
    expected = {row["meaning"]: row["written"] for row in answers(folder)}
    rows = predicted(run, folder, "--texts", str(data / "test.txt"))
    assert len(rows) == 8 and all(expected[row["prompt"].partition("||")[0].strip()] == row["written"] for row in rows)
    with monkeypatch.context() as patch:
        patch.setattr(CausalLMTask, "write", lambda self, prompts, *_, **__: [" one\n\ntwo"] * len(prompts))
        assert {row["written"] for row in predicted(run, folder, "--texts", str(data / "test.txt"))} == {"one"}
    (tmp_path / "long.txt").write_text("a" * 1020 + "\nshort\n" + "b" * 1030)
    shown = run("predict", "--adapter", str(folder / "adapter"), "--texts", "long.txt")
    assert shown.code == 2 and not (tmp_path / "predictions.csv").exists()
    assert "1,040 tokens, 9 of them new" in shown.err


# What classifiers say


def test_classes_are_those_of_the_test(run: Run, critic: Path, tmp_path: Path) -> None:
    """Shares as `classify` gives them, the test's accuracy, and the cut of the training; labels are left out."""
    test = critic.parents[1] / "data" / "test.csv"
    rows = predicted(run, critic, "--texts", str(test))
    labels = [row["label"] for row in csv.DictReader(test.open())]
    right = sum(row["class"] == label for row, label in zip(rows, labels, strict=True))
    results = json.loads((critic / "results.json").read_text())
    assert right / len(rows) == pytest.approx(results["test/acc"])
    assert list(rows[0]) == ["text", "class", "probability", "class_2", "probability_2"]
    task = load_language_task(critic / "adapter")
    shares = task.classify([row["text"] for row in rows], max_length=24)
    for row, own in zip(rows, shares, strict=True):
        named = dict(zip(task.classnames, own.tolist(), strict=True))
        assert float(row["probability"]) == pytest.approx(named[row["class"]], abs=2e-6)
        assert float(row["probability"]) >= float(row["probability_2"])


@pytest.mark.parametrize("adapter", [FullFineTuning(), BitFit(), RandLoRA(rank=8)])
def test_half_precision_is_near(run: Run, tmp_path: Path, adapter: Adapter) -> None:
    """Full fine-tuning leaves nothing frozen to cast: its products alone are in half precision."""
    task = classify.make(adapter=adapter)
    task.set_classes(["no", "yes"])
    task.adapt()
    task.save(tmp_path / "run" / "adapter")
    (tmp_path / "t.txt").write_text("a fine film\na dull one\n")
    rows = predicted(run, tmp_path / "run", "--texts", "t.txt", "--precision", "bf16")
    shares = task.classify(["a fine film", "a dull one"]).max(1).values
    assert [float(row["probability"]) for row in rows] == pytest.approx(shares.tolist(), abs=0.05)


def test_long_texts_are_cut_as_in_the_training_and_told(run: Run, critic: Path, tmp_path: Path) -> None:
    kept = "a great film, so it is"  # and two marks: 24 tokens
    (tmp_path / "t.txt").write_text(f"{kept} not at all\n a dull tale \n")
    shown = run("predict", "--adapter", str(critic / "adapter"), "--texts", "t.txt")
    assert shown.code == 0 and "24" in shown.err
    assert "predictions.csv: 2 texts, the best 2 classes of each" in shown.out
    rows = read((tmp_path / "predictions.csv").read_text())
    assert [row["text"] for row in rows] == [f"{kept} not at all", "a dull tale"]
    (tmp_path / "kept.txt").write_text(f"{kept}\n")
    (best,) = predicted(run, critic, "--texts", "kept.txt", "--top-k", "1")
    assert list(best) == ["text", "class", "probability"] and best["probability"] == rows[0]["probability"]


def test_scores_of_pairs(run: Run, refused: Refused, tmp_path: Path) -> None:
    data = write_scores(tmp_path / "data")
    words = ("--data.dataset", "jsonl", "--data.root", str(data), "--data.scores", "true", "--data.steps", "2")
    folder = fitted(tmp_path / "runs", *classify.TYPED, *words)
    rows = predicted(run, folder, "--texts", str(data / "test.jsonl"))
    assert list(rows[0]) == ["text_a", "text_b", "score"] and len(rows) == 9
    task = load_language_task(folder / "adapter")
    expected = task.classify([(row["text_a"], row["text_b"]) for row in rows])[:, 0]
    found = torch.tensor([float(row["score"]) for row in rows])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    (tmp_path / "t.txt").write_text("single\n")
    base = ("predict", "--adapter", str(folder / "adapter"), "--texts")
    assert "text_a" in refused(*base, "t.txt")
    assert "t.txt" in refused(*base, str(data / "test.jsonl"), "t.txt")
    assert "--top-k" in refused(*base, "t.txt", "--top-k", "1")


# Several adapters, files, mistakes


def test_several_adapters_say_what_each_says_alone(run: Run, repeater: Path, toy: Path, tmp_path: Path) -> None:
    other = load_language_task(repeater / "adapter", max_new_tokens=2)
    other.finish_evaluation()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.mul_(-0.5)
    other.save(tmp_path / "other" / "adapter")
    base = ("predict", "--texts", str(toy / "test.jsonl"), "--output")
    paths = (str(repeater / "adapter"), str(tmp_path / "other" / "adapter"))
    alone = [read(run(*base, "-", "--adapter", path).out) for path in paths]
    assert alone[0] != alone[1]
    shown = run(*base, "both.csv", "--adapter", f"one={paths[0]}", f"two={paths[1]}")
    assert shown.code == 0, shown.err
    assert "both.csv: 24 prompts, 2 adapters (one, two), at most 2 tokens after each or at most 4" in shown.out
    text = (tmp_path / "both.csv").read_text()
    assert text.startswith("prompt,adapter,written\n")
    for name, rows in zip(("one", "two"), alone, strict=True):
        assert [row["written"] for row in read(text) if row["adapter"] == name] == [row["written"] for row in rows]


WRONG = {
    "empty.txt": (b"\n \n", "empty.txt has no text"),
    "empty.jsonl": (b"", "empty.jsonl has no text"),
    "bad.jsonl": (b'{"prompt": "a"}\n{"prompt": "b"\n', "bad.jsonl, line 2: no valid JSON"),
    "less.jsonl": (b'{"prompt": "a"}\n{"completion": "b"}\n', "less.jsonl, line 2: 'prompt' is missing"),
    "number.jsonl": (b'{"prompt": "a"}\n3\n', "line 2: expected an object with the fields prompt"),
    "blank.jsonl": (b'{"prompt": " "}\n', "blank.jsonl, line 1: the prompt is empty"),
    "asked.jsonl": (b'{"instruction": "a"}\n', "asked.jsonl, line 1: 'instruction' is for models"),
    "p.csv": (b"prompt,completion\na,b,c\n", "p.csv, line 2: 3 fields, but the header has 2"),
    "p.tsv": (b"prompt\na\n", "p.tsv is not a .txt, .jsonl or .csv file"),
    "latin.txt": (b"fine\n\xe9t\xe9\n", "latin.txt, line 2: this is not UTF-8"),
}


def test_files_that_are_wrong_are_told(refused: Refused, repeater: Path, critic: Path, tmp_path: Path) -> None:
    def said(file: str, folder: Path = repeater) -> str:
        return refused("predict", "--adapter", str(folder / "adapter"), "--texts", file)

    for name, (content, message) in WRONG.items():
        (tmp_path / name).write_bytes(content)
        assert message in said(name)
    assert "nowhere.txt does not exist" in said("nowhere.txt")
    assert "is a folder: give its files" in said(".")
    assert "'text' (or 'text_a' and 'text_b') is missing" in said("less.jsonl", critic)
    (tmp_path / "pair.jsonl").write_text('{"text_a": "a", "text_b": "b"}\n')
    assert "was trained on single texts: give records with text" in said("pair.jsonl", critic)


def test_words_that_are_wrong_are_told(refused: Refused, run: Run, repeater: Path, critic: Path, toy: Path) -> None:
    texts = str(toy / "test.jsonl")
    base = ("predict", "--adapter", str(repeater / "adapter"))
    assert "--images" in refused(*base)
    assert "'--texts'" in refused(*base, "--text", texts)
    assert "allowed" in refused(*base, "--texts", texts, "--images", "photos")
    assert "--images" in refused(*base, "--images", "photos")
    assert "--beams" in refused(*base, "--texts", texts, "--beams", "0")
    assert "--weights" in refused(*base, "--texts", texts, "--weights", "1")
    assert "--top-k" in refused(*base, "--texts", texts, "--top-k", "1")
    both = ("predict", "--adapter", f"a={repeater / 'adapter'}", f"b={critic / 'adapter'}", "--texts", texts)
    assert "a, b have different outputs" in refused(*both)
    said = refused("predict", "--adapter", str(critic / "adapter"), "--texts", texts, "--beams", "2")
    assert "--beams needs a model that generates text" in said
    assert run(*base, "--texts", texts, "--output", "p.csv", "--max-new-tokens", "1").code == 0
    assert "p.csv exists" in refused(*base, "--texts", texts, "--output", "p.csv")


def test_memory_that_runs_out_is_told(
    refused: Refused, repeater: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("randlora_pl.language.tasks.causal_lm.write_texts", full)
    base = ("predict", "--adapter", str(repeater / "adapter"), "--texts", str(toy / "test.jsonl"))
    assert "--batch-size" in refused(*base)
    assert "--precision" in refused(*base, "--batch-size", "1")


def test_a_base_model_that_moved_is_given(run: Run, tokenizer: Path, tmp_path: Path) -> None:
    make(tokenizer).build().save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    task = CausalLMTask(base, tokenizer=str(tokenizer), adapter=RandLoRA(rank=8), max_new_tokens=4)
    task.adapt()
    task.save(tmp_path / "run" / "adapter")
    (tmp_path / "t.txt").write_text("red old tall\n")
    here = predicted(run, tmp_path / "run", "--texts", "t.txt")
    (tmp_path / "base").rename(tmp_path / "moved")
    gone = run("predict", "--adapter", str(tmp_path / "run" / "adapter"), "--texts", "t.txt")
    assert gone.code == 2 and "cannot be loaded" in gone.err
    assert predicted(run, tmp_path / "run", "--texts", "t.txt", "--pretrained", "moved") == here
