import json
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from randlora_pl.language.prompt_sets import (
    TASKS,
    Item,
    Question,
    hold_out,
    instruction_prompt,
    read_e2e,
    read_items,
    read_questions,
)
from randlora_pl.utils.errors import UserError
from tests.language.files import LETTERS, record, write, write_commonsense, write_e2e
from tests.support.products import in_one_item


def first_answer(text: str, answers: tuple[str, ...]) -> str | None:
    return Item("boolq", "", "", answers).find_answer(text)


@pytest.mark.parametrize("nested", [False, True])
def test_all_files_are_read_flat_and_as_the_repository_has_them(tmp_path: Path, nested: bool) -> None:
    write_commonsense(tmp_path, 6, nested)
    train = read_questions(tmp_path)
    assert train == [Question(**record(task, number)) for number in range(6) for task in LETTERS]
    assert read_questions(tmp_path, "commonsense_170k") == train * 2
    for task in TASKS:
        assert read_questions(tmp_path, task) == [Question(**record(task, number)) for number in range(6)]


@in_one_item("task", TASKS)
def test_options_are_those_that_the_question_offers(task: str) -> None:
    question = Question(**record(task, 1))
    assert question.options(TASKS[task]) == LETTERS[task]
    completions = [question.completion(option) for option in question.options(TASKS[task])]
    assert completions == [f"the correct answer is {option}" for option in LETTERS[task]]
    assert question.completion(question.answer) == question.output


@pytest.mark.parametrize(
    "instruction",
    ["no format", "Answer format: yes/no", "Answer format: answer1/answer1/answer2", "Answer format: answer1/answer3"],
)
def test_a_format_that_cannot_be_right_is_not_believed(instruction: str) -> None:
    question = Question(instruction, "", "it is answer2", "answer2")
    assert question.options(TASKS["openbookqa"]) == TASKS["openbookqa"].answers


def test_only_the_last_mention_of_the_answer_is_exchanged() -> None:
    question = Question("?", "", "true or false: it is true.", "true")
    assert question.completion("false") == "true or false: it is false."
    assert Question("?", "", "yes", "true").completion("false") == "false"


def test_missing_files_tell_the_tree_and_where_to_get_them(tmp_path: Path) -> None:
    for read in (lambda: read_questions(tmp_path), lambda: read_questions(tmp_path, "piqa")):
        with pytest.raises(UserError, match=r"NAME/test\.json[\s\S]*LLM-Adapters"):
            read()
    (tmp_path / "commonsense_15k.json").write_text("[]")
    with pytest.raises(UserError, match=r"commonsense_15k\.json"):
        read_questions(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "maybe"}, "the answer 'maybe' is not one of true, false"),
        ({"output": " "}, "'output' is empty"),
        ({"input": None}, "'input' must be text, not null"),
        ({"answer": True}, "'answer' must be text, not true"),
    ],
)
def test_a_wrong_record_is_told_with_its_line(tmp_path: Path, change: dict[str, object], said: str) -> None:
    (tmp_path / "boolq").mkdir()
    path = tmp_path / "boolq" / "test.json"
    path.write_text(json.dumps([record("boolq", 0), record("boolq", 1) | change], indent=4))
    with pytest.raises(UserError) as error:
        read_questions(tmp_path, "boolq")
    assert str(error.value).startswith(f"{path}, line 8: {said}")


@given(st.integers(1, 60), st.data())
def test_a_split_divides_and_depends_on_the_seed_alone(count: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, count - 1))
    questions = [Question(f"question {number}", "", "a", "a") for number in range(count)]
    train, validation = hold_out(questions, size, 7)
    assert len(validation) == size
    assert sorted(train + validation, key=questions.index) == questions
    assert train == [question for question in questions if question not in validation]
    assert hold_out(questions, size, 7) == (train, validation)


def test_other_seeds_validate_with_others() -> None:
    questions = [Question(f"question {number}", "", "a", "a") for number in range(2000)]
    _, first = hold_out(questions, None)
    _, second = hold_out(questions, None, seed=43)
    assert len(hold_out(questions[:500], None)[1]) == 50
    assert len(first) == 120
    assert first != second
    assert first != questions[:120]
    with pytest.raises(UserError, match="nothing"):
        hold_out(questions[:3], 3)


@in_one_item(
    ("task", "text", "answer"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "not false but true", "false"),
        ("boolq", "True", None),  # the official evaluation looks for lower case alone
        ("boolq", "untrue", "true"),
        ("piqa", "solution 1", None),
        ("hellaswag", "ending4ending1", "ending4"),
        ("ARC-Challenge", "answer6 answer1", "answer1"),
        ("openbookqa", "", None),
    ],
)
def test_the_first_word_of_the_answer_set_is_the_answer(task: str, text: str, answer: str | None) -> None:
    assert first_answer(text, TASKS[task].answers) == answer


def test_the_longest_of_the_answers_that_start_at_one_place_is_taken() -> None:
    assert first_answer("answer10", ("answer1", "answer10")) == "answer10"
    assert first_answer("a.b", ("a.b", ".")) == "a.b"
    assert first_answer("axb", ("a.b",)) is None
    own = Item("test", "q", "4")  # without options any text is an answer
    assert [own.find_answer(text) for text in (" 4 ", "4 5", "")] == ["4", "4 5", ""]


@given(st.sampled_from(sorted(TASKS)), st.text(), st.data())
def test_the_answer_is_that_of_a_search_from_every_place(task: str, text: str, data: st.DataObject) -> None:
    answers = TASKS[task].answers
    text += data.draw(st.sampled_from((*answers, ""))) + data.draw(st.text()) + data.draw(st.sampled_from(answers))
    starting = [answer for place in range(len(text)) for answer in answers if text.startswith(answer, place)]
    assert first_answer(text, answers) == starting[0]


def test_the_prompt_has_the_shape_of_alpaca() -> None:
    first = "The instruction below describes a task. Write a response that completes it."
    assert instruction_prompt("Add 1 and 2") == f"{first}\n\n### Instruction:\nAdd 1 and 2\n\n### Response:\n"
    first = (
        "The instruction below describes a task, and an input belongs to it. Write a response that completes the task."
    )
    assert instruction_prompt("Add them", "1 and 2") == (
        f"{first}\n\n### Instruction:\nAdd them\n\n### Input:\n1 and 2\n\n### Response:\n"
    )


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_lines_are_read_and_grouped_by_meaning(tmp_path: Path, split: Literal["train", "validation", "test"]) -> None:
    found = read_e2e(write_e2e(tmp_path), split)
    assert len(found) == 4
    assert found[0][0] == "name : The Vaults | Type : pub | price : more than £ 30"
    assert found[1][1] == "Aromi is a coffee shop , not family-friendly ."
    groups = {item.prompt: list(item.references) for item in read_items("e2e", tmp_path, None)}
    assert list(groups) == [found[0][0], "name : Aromi | Type : coffee shop"]
    assert groups[found[0][0]] == [found[0][1], found[2][1]]
    assert groups[found[1][0]] == [found[1][1], found[3][1]]


@pytest.mark.parametrize("line", ["no bars", "a || b || c", "a ||", "|| b", "a | b"])
def test_a_malformed_line_is_told_with_its_number(tmp_path: Path, line: str) -> None:
    write(tmp_path / "train.txt", "a||b", "", line)
    with pytest.raises(UserError) as error:
        read_e2e(tmp_path, "train")
    assert str(error.value).startswith(f"{tmp_path / 'train.txt'}, line 3: expected")
    assert "\n" not in str(error.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"test\.txt[\s\S]*e2e"):
        read_e2e(tmp_path, "validation")
    write(tmp_path / "train.txt", "")
    with pytest.raises(UserError, match="has no lines"):
        read_e2e(tmp_path, "train")
