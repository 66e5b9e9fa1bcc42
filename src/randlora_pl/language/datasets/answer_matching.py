"""Answer of a model: the first word of the answer set that occurs in its text."""

import re
from collections.abc import Sequence


def first_answer(text: str, answers: Sequence[str]) -> str | None:
    """Return the answer that occurs first in a text, or ``None``.

    As in the official evaluation case counts and an answer is found within words too; of answers that start at one
    place the longest is taken.

    Args:
        text: Output of the model, without the prompt.
        answers: The words that can be answered.
    """
    longest_first = sorted(answers, key=len, reverse=True)
    found = re.search("|".join(map(re.escape, longest_first)), text)
    return found[0] if found else None
