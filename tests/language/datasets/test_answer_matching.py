from hypothesis import given, settings
from hypothesis import strategies as st

from randlora_pl.language.datasets.answer_matching import first_answer
from randlora_pl.language.datasets.commonsense import TASKS
from tests.support.products import in_one_item


@in_one_item(
    ("task", "text", "answer"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "not false but true", "false"),
        ("boolq", "True", None),  # the official evaluation looks for lower case alone
        ("boolq", "untrue", "true"),
        ("piqa", "solution2, as solution1 is wrong", "solution2"),
        ("piqa", "solution 1", None),
        ("social_i_qa", "answer3", "answer3"),
        ("hellaswag", "ending4ending1", "ending4"),
        ("winogrande", "option2\noption1", "option2"),
        ("ARC-Easy", "answer5", "answer5"),
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


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(TASKS)), st.text(), st.data())
def test_the_answer_is_that_of_a_search_from_every_place(task: str, text: str, data: st.DataObject) -> None:
    answers = TASKS[task].answers
    text += data.draw(st.sampled_from((*answers, ""))) + data.draw(st.text()) + data.draw(st.sampled_from(answers))
    starting = [answer for place in range(len(text)) for answer in answers if text.startswith(answer, place)]
    assert first_answer(text, answers) == starting[0]
