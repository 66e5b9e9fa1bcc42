"""Scoring what a model wrote: the first word of the answer set that occurs, and exact match with the right one."""

import re
from collections.abc import Sequence
from dataclasses import dataclass


def first_answer(text: str, answers: Sequence[str]) -> str | None:
    """The answer that occurs first in a text, or ``None``.

    As in the official evaluation case counts and an answer is found within words too; of answers that start at one
    place the longest is taken.

    Args:
        text: What the model wrote, without the prompt.
        answers: The words that can be answered.
    """
    longest_first = sorted(answers, key=len, reverse=True)
    found = re.search("|".join(map(re.escape, longest_first)), text)
    return found[0] if found else None


@dataclass(frozen=True)
class Score:
    """How many answers were right and how many texts held no answer at all.

    Attributes:
        count: Texts.
        right: Those whose first answer is the right one.
        missing: Those without an answer; they count as wrong.
    """

    count: int
    right: int
    missing: int

    @property
    def accuracy(self) -> float:
        """Share of right answers in 0..1."""
        return self.right / self.count

    @property
    def missing_rate(self) -> float:
        """Share of texts without an answer in 0..1."""
        return self.missing / self.count


def score(texts: Sequence[str], right: Sequence[str], answers: Sequence[str]) -> Score:
    """Exact match of the first answer in each text.

    Args:
        texts: What the model wrote, without the prompts; at least one.
        right: The right answer of each.
        answers: The task's answers.

    Raises:
        ValueError: There is no text, or not as many texts as right answers.
    """
    if not texts or len(texts) != len(right):
        raise ValueError(f"{len(texts)} texts for {len(right)} right answers")
    found = [first_answer(text, answers) for text in texts]
    matches = sum(answer == wanted for answer, wanted in zip(found, right, strict=True))
    return Score(len(texts), matches, found.count(None))
