"""Texts as numbered batches: what is read and counted, in which order, and what is refused."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from randlora_pl.data.loader import DrawPlan, EvalSchedule, TrainSchedule
from randlora_pl.language import text_files
from randlora_pl.language.batches import Sentences, TextEvalBatches, TextTrainBatches, Tokens
from randlora_pl.language.data import LabelledTexts, TextData
from randlora_pl.language.glue import TASKS, read_glue
from randlora_pl.language.tokenization import IGNORED, Encoded, load_tokenizer
from randlora_pl.utils.errors import UserError
from tests.language.classify import labelled, reviews, write_csv, write_reviews, write_scores
from tests.language.files import write_glue
from tests.language.tokenizers import sentence_tokenizer


class Given(LabelledTexts):
    """With a tokenizer, and without a task."""

    _given = sentence_tokenizer()

    def setup(self, stage: str | None = None) -> None:
        self._tokenizer = self._given
        super().setup(stage)


@pytest.mark.parametrize("name", TASKS)
def test_glue_is_trained_on_whole_and_tested_on_its_validation_set(name: str, tmp_path: Path) -> None:
    write_glue(tmp_path)
    data = Given(dataset=name, root=str(tmp_path))
    data.setup("fit")
    assert data.val_dataloader() == []
    data.setup("test")
    (batch,) = list(data.test_dataloader())
    expected = read_glue(tmp_path, name, "validation")
    order = batch["index"].tolist()
    assert batch["labels"].tolist() == pytest.approx([expected.labels[place] for place in order])
    assert batch["labels"].dtype == (torch.float32 if name == "stsb" else torch.int64)
    alone = [data._given(*expected.sentences[place])["input_ids"] for place in order]
    assert [row[: len(ids)].tolist() for row, ids in zip(batch["input_ids"], alone, strict=True)] == alone
    assert batch["attention_mask"].sum(1).tolist() == list(map(len, alone))
    assert data.classnames == list(TASKS[name].names) and data.metric == TASKS[name].metric
    facts = data.summary()
    assert facts["train"] == len(read_glue(tmp_path, name, "train").labels) and facts["test"] == len(expected.labels)


def test_validation_is_set_aside_alike_for_every_seed(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "one.csv", reviews())
    held = []
    for seed in (0, 1):
        data = Given(dataset="csv", root=str(file), validation=17, seed=seed, batch_size=8)
        data.setup("fit")
        data.setup("test")
        assert len(data._held["train"]) == len(reviews()) - 17 and data.test_dataloader() == []
        held.append([data._held["val"][place]["input_ids"] for place in range(17)])
    assert held[0] == held[1]


def test_own_files_train_validate_and_test(tmp_path: Path) -> None:
    write_reviews(tmp_path)
    data = Given(dataset="csv", root=str(tmp_path), batch_size=8)
    data.setup("fit")
    data.setup("test")
    assert data.classnames == ["negative", "positive"]
    assert [len(data._held[split]) for split in ("train", "val", "test")] == [131, 20, 41]
    assert data.plan is not None and data.plan.samples_drawn == 1310  # ten epochs
    seen = torch.cat([batch["labels"] for batch in data.train_dataloader()])
    labels = torch.tensor([int(name == "positive") for _, name in reviews()[61:]])
    assert seen.bincount().tolist() == (10 * labels.bincount()).tolist()


def test_own_texts_of_unequal_classes_are_remarked_upon(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_csv(tmp_path / "one.csv", [(f"text {n}", "rare" if n < 3 else "usual") for n in range(60)])
    data = Given(dataset="csv", root=str(file), validation=0, steps=1)
    with caplog.at_level(logging.WARNING, "randlora_pl"):
        data.setup("fit")
    assert [line for line in caplog.messages if "57 training samples" in line and "--data.balance weights" in line]


@pytest.mark.parametrize("name", ["csv", "rte"])
def test_a_fit_reads_each_file_once_and_keeps_no_texts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_reviews(tmp_path)
    write_glue(tmp_path)
    read: list[str] = []
    whole = text_files.read_plain
    monkeypatch.setattr(text_files, "read_plain", lambda path: read.append(path.stem) or whole(path))  # type: ignore[func-returns-value]
    once, data = (Given(dataset=name, root=str(tmp_path), batch_size=8, steps=1) for _ in range(2))
    data.check_test()
    data.setup("fit")
    assert data._checked == {}
    data.setup("test")
    assert sorted(read) == (["test", "train", "val"] if name == "csv" else ["dev", "train"])
    once.setup("fit")
    once.setup("test")
    assert once.summary() == data.summary() and once.state_dict() == data.state_dict()


def test_pairs_have_scores_and_segments(tmp_path: Path) -> None:
    write_scores(tmp_path)
    data = Given(dataset="jsonl", root=str(tmp_path), scores=True, steps=1, batch_size=4)
    data.setup(None)
    (batch,) = list(data.train_dataloader())
    assert batch["labels"].dtype == torch.float32 and data.classnames == []
    assert batch["token_type_ids"].max() == 1


def test_long_texts_are_cut_counted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [("the task " * 20, "a"), ("the", "b"), ("the task " * 30, "a")]
    write_csv(tmp_path / "train.csv", rows)
    write_csv(tmp_path / "test.csv", rows[:2])
    data = Given(dataset="csv", root=str(tmp_path), max_length=10, batch_size=2)
    with caplog.at_level(logging.WARNING, "randlora_pl"):
        data.setup("fit")
        data.setup("test")
    facts = data.summary()
    assert (facts["cut_train"], facts["cut_test"], facts["longest"], data.longest) == (2, 1, 62, 10)
    assert "2 of 3 samples are longer than 10 tokens" in caplog.text
    assert "2 of 3 samples are longer than 10 tokens" in data.summary_lines(facts)["max length"]


def test_samples_come_back_from_the_flat_arrays() -> None:
    tokenizer: Any = sentence_tokenizer()
    encoded = [dict(tokenizer(*texts)) for texts in (("the task", "a"), ("a pub type price", "the"), ("the", "the"))]
    held = Sentences(encoded, [1, 0, 2], True, tokenizer, 0)
    assert [held[place] for place in range(3)] == encoded
    assert held.by_length() == np.argsort([-len(row["input_ids"]) for row in encoded], kind="stable").tolist()
    assert held.lengths.sum() == sum(len(row["input_ids"]) for row in encoded)


def test_mistakes_are_told(tmp_path: Path) -> None:
    write_reviews(tmp_path)
    write_csv(tmp_path / "test.csv", [("a fine film", "positve")])
    data = Given(dataset="csv", root=str(tmp_path))
    with pytest.raises(UserError, match="'positive'"):
        data.setup("test")
    write_csv(tmp_path / "test.csv", [("a fine film", "b", "positive")], ("text_a", "text_b", "label"))
    with pytest.raises(UserError, match="single"):
        data.setup("test")
    (tmp_path / "train.csv").write_text("")
    with pytest.raises(UserError, match=r"train.csv"):
        data.setup("fit")
    with pytest.raises(UserError, match=r"--data.root"):
        Given(dataset="sst2", root=str(tmp_path)).setup("fit")
    for options, message in (
        ({"dataset": "sst"}, "Did you mean 'sst2'"),
        ({"dataset": "csv"}, "needs --data.root"),
        ({"dataset": "rte", "scores": True}, "Remove the option"),
        ({"validation": -1}, "0 or a positive"),
        ({"max_length": 2}, "of at least 4"),
    ):
        with pytest.raises(UserError, match=message):
            LabelledTexts(**options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="nothing"):
        Given(dataset="csv", root=str(write_csv(tmp_path / "few.csv", [("a", "x"), ("b", "y")])), validation=2).setup()
    with pytest.raises(UserError, match="tokenizer"):
        labelled(tmp_path).setup("fit")


def test_a_trainer_s_task_gives_the_tokenizer(tmp_path: Path) -> None:
    data = labelled(write_reviews(tmp_path))
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=SimpleNamespace(vocabulary=sentence_tokenizer()), accumulate_grad_batches=1, world_size=1
    )
    data.setup("fit")
    assert data.plan is not None and data.plan.steps == 3


def test_classes_of_different_size_are_balanced(tmp_path: Path) -> None:
    some = [(text, name) for number, (text, name) in enumerate(reviews()) if name == "positive" or number % 5 == 0]
    file = write_csv(tmp_path / "one.csv", some)
    labels = torch.tensor([int(name == "positive") for _, name in some])
    weighted, drawn = (
        Given(dataset="csv", root=str(file), batch_size=8, steps=40, balance=balance)
        for balance in ("weights", "sampler")
    )
    for data in (weighted, drawn):
        data.setup("fit")
    total = torch.zeros(2)
    for batch in drawn.train_dataloader():
        total += batch["labels"].bincount(minlength=2)
    assert total.tolist() == [160, 160]
    batch = next(iter(weighted.train_dataloader()))
    expected = len(labels) / 2 / labels.bincount() / 8
    torch.testing.assert_close(batch["weight"], expected[batch["labels"]].float())
    with pytest.raises(UserError, match="scores"):
        Given(dataset="stsb", balance="weights")


def tokens(*lengths: int) -> Tokens:
    """Samples of so many tokens, all but the first of them learned."""
    return Tokens((Encoded(list(range(1, n + 1)), list(range(1, n + 1)), n) for n in lengths), 0)


def test_tokens_come_back_without_the_label_of_the_first() -> None:
    held = tokens(3, 1, 5)
    assert len(held) == 3 and held.lengths.sum() == 9
    assert held[2] == Encoded([1, 2, 3, 4, 5], [IGNORED, 2, 3, 4, 5], 5)
    assert held.counted.tolist() == [2, 0, 4]


@pytest.mark.parametrize("world", [1, 2])
def test_weights_of_a_step_add_up(world: int) -> None:
    """Over ranks and micro-batches the weights times tokens are all of them, padded samples count nothing."""
    held = tokens(3, 9, 5, 2, 7, 4, 6)
    plan = DrawPlan(7, 7, 6, 0, "epochs")
    seen = []
    for rank in range(world):
        schedule = TrainSchedule(plan, 3 // world if world == 1 else 2, 2, world, rank)
        batches = TextTrainBatches(held, schedule)
        seen += [batches[number] for number in range(len(batches))]
    for total in {batch["step_tokens"] for batch in seen}:
        own = [batch for batch in seen if batch["step_tokens"] == total]
        learned = [(batch["labels"][:, 1:] != IGNORED).sum(1)[batch["weight"] > 0].sum() for batch in own]
        assert sum(learned) == total
        assert sum(float(batch["weight"].sum()) for batch in own) == pytest.approx(2 * world)


def test_evaluation_goes_from_long_to_short_and_takes_each_once() -> None:
    held = tokens(3, 9, 5, 2, 7)
    order = held.by_length()
    assert order == [1, 4, 2, 0, 3]
    batches = TextEvalBatches(held, EvalSchedule(5, 2), order)
    taken = [batches[number]["index"][batches[number]["weight"] > 0].tolist() for number in range(len(batches))]
    assert taken == [[1, 4], [2, 0], [3]]
    assert [batches[number]["input_ids"].shape[1] for number in range(3)] == [16, 8, 8]


def data(folder: Path, **options: object) -> TextData:
    made = TextData(dataset="jsonl", root=str(folder), validation=0, **options)  # type: ignore[arg-type]
    made._tokenizer = load_tokenizer("bytes")
    return made


def test_long_samples_are_cut_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "ab", "completion": "c" * length} for length in (1, 4, 30)]
    rows.append({"prompt": "p" * 20, "completion": "lost"})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = data(tmp_path, cutoff=8, mask_prompt=True, batch_size=2, epochs=2)
    made.setup("fit")
    facts = made.summary()
    assert facts["train"] == 3 and facts["cut"] == 2 and facts["dropped"] == 1 and facts["longest"] == 33
    assert facts["steps"] == 3 and facts["tokens"] == 4 + 7 + 8
    assert "2 of 4 samples are longer than 8 tokens" in made.summary_lines(facts)["cutoff"]


def test_a_fit_reads_each_file_once_and_asks_for_scorers_of_references_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"prompt": split, "completion": "so"}))
    read: list[str] = []
    whole = text_files.read_plain
    monkeypatch.setattr(text_files, "read_plain", lambda path: read.append(path.name) or whole(path))  # type: ignore[func-returns-value]
    monkeypatch.setattr("randlora_pl.language.data.need_scorers", lambda: pytest.fail("no text has references"))
    made = data(tmp_path, steps=1, batch_size=1)
    made.check_test()
    assert read == ["test.jsonl"]
    made.setup("fit")
    made.setup("test")
    assert sorted(read) == ["test.jsonl", "train.jsonl", "val.jsonl"]
    assert [item.prompt for item in made.items] == ["test"] and len(made._held["test"]) == 1


def test_the_start_page_says_how_many_samples_are_tested(tmp_path: Path) -> None:
    """They are read before the training, and encoded after it."""
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        (tmp_path / f"{split}.jsonl").write_text("\n".join([json.dumps({"prompt": split, "completion": "so"})] * count))
    made = data(tmp_path, steps=1, batch_size=1)
    made.check_test()
    made.setup("fit")
    assert made.summary_lines(made.summary())["data"] == "jsonl: 5 train, 2 val, 3 test samples"
    (tmp_path / "test.jsonl").unlink()
    for checked, more in ((True, "; none to test (no test.jsonl in --data.root)"), (False, "")):
        made = data(tmp_path, steps=1, batch_size=1)
        if checked:  # not where a search asks for no test
            made.check_test()
        made.setup("fit")
        assert made.summary_lines(made.summary())["data"] == f"jsonl: 5 train, 2 val samples{more}"


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'boolk'"):
        TextData(tests=["boolk"])
    for some in ([], ["boolq", "piqa", "boolq"]):
        with pytest.raises(UserError, match="list each test once"):
            TextData(tests=some)
    with pytest.raises(UserError, match="cutoff"):
        TextData(cutoff=1)
    with pytest.raises(UserError, match=r"needs --data\.root"):
        TextData(dataset="jsonl")
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "p" * 20, "completion": "lost"}))
    with pytest.raises(UserError, match="token to learn"):
        data(tmp_path, cutoff=8, mask_prompt=True).setup("fit")


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_an_empty_file_of_ones_own_is_told_with_what_it_should_hold(name: str, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        text = "" if split == name else json.dumps({"prompt": "a", "completion": "b"})
        (tmp_path / f"{split}.jsonl").write_text(text)
    with pytest.raises(
        UserError, match=rf'{name}\.jsonl has no records\. Expected: .*"prompt": .*"completion"'
    ) as found:
        data(tmp_path).setup()
    assert "again" not in str(found.value)


def test_bytes_need_no_file() -> None:
    tokenizer = load_tokenizer("bytes")
    assert len(tokenizer) == 258
    text = "Größe\n  42 \t✓"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and len(ids) == len(text.encode())
    assert torch.tensor(ids).max() < 256


def test_a_prompt_without_tokens_is_refused(toy: Path, tokenizer: Path, tmp_path: Path) -> None:
    rows = (toy / "test.jsonl").read_text().splitlines()[:2]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*rows, json.dumps({"prompt": " ", "completion": "red"})]))
    data = TextData(dataset="jsonl", root=str(tmp_path))
    data._tokenizer = load_tokenizer(str(tokenizer))
    with pytest.raises(UserError, match="prompts"):
        data.setup("test")
