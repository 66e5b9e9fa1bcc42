"""Texts as numbered batches: what is counted, in which order, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from randlora_pl.data.loader import DrawPlan, EvalSchedule, TrainSchedule
from randlora_pl.language import text_files
from randlora_pl.language.batches import TextEvalBatches, TextTrainBatches, Tokens
from randlora_pl.language.data import TextData
from randlora_pl.language.prompt_sets import Item
from randlora_pl.language.tokenization import IGNORED, Encoded, load_tokenizer
from randlora_pl.utils.errors import UserError


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


def test_answers_are_found() -> None:
    choice = Item("boolq", "q", "true", ("true", "false"))
    assert choice.found("the answer is true, not false") == "true"
    assert choice.found("false") == "false"
    assert choice.found("I do not know") is None
    own = Item("test", "q", "4")
    assert own.found(" 4 ") == "4"
    assert own.found("4 5") == "4 5"
    assert own.found("") == ""


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
        with pytest.raises(UserError, match="name each test once"):
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
