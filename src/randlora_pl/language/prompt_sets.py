"""The texts of the paper that a decoder writes: commonsense (section 5.4, Table 15) and the E2E challenge (B.2).

The commonsense files come from LLM-Adapters: ``commonsense_15k.json`` and ``commonsense_170k.json`` to train on and
``NAME/test.json`` for the eight tests; their prompt, and what counts as an answer, is here. E2E has one line ``meaning
representation || reference`` for each reference.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from randlora_pl.language.text_files import first_file, read_lines, read_records
from randlora_pl.utils.errors import UserError

FIELDS = ("instruction", "input", "output", "answer")
TREE = "commonsense_15k.json or commonsense_170k.json, and NAME/test.json for NAME of boolq, piqa, social_i_qa, "
TREE += "hellaswag, winogrande, ARC-Easy, ARC-Challenge, openbookqa"
SOURCE = "the folders ft-training_set and dataset of https://github.com/AGI-Edgerunners/LLM-Adapters"


@dataclass(frozen=True)
class Task:
    """One of the eight tests: its folder, its title in the paper's tables, and the possible answers by option."""

    name: str
    title: str
    answers: tuple[str, ...]


_FIVE = "answer1 answer2 answer3 answer4 answer5"

TASKS = {
    name: Task(name, title, tuple(answers.split()))
    for name, title, answers in (
        ("boolq", "BoolQ", "true false"),
        ("piqa", "PIQA", "solution1 solution2"),
        ("social_i_qa", "SIQA", _FIVE),
        ("hellaswag", "HellaSwag", "ending1 ending2 ending3 ending4"),
        ("winogrande", "WinoGrande", "option1 option2"),
        ("ARC-Easy", "ARC-e", _FIVE),
        ("ARC-Challenge", "ARC-c", _FIVE),
        ("openbookqa", "OBQA", _FIVE),
    )
}


@dataclass(frozen=True)
class Question:
    """One record.

    Attributes:
        instruction: The question with its options.
        input: More text; empty in the published files.
        output: Text to learn, such as ``the correct answer is true``.
        answer: The scored word, such as ``true``.
    """

    instruction: str
    input: str
    output: str
    answer: str

    @property
    def prompt(self) -> str:
        """The text before the answer."""
        return instruction_prompt(self.instruction, self.input)

    def options(self, task: Task) -> tuple[str, ...]:
        """Return the answers that this question offers: from its line ``Answer format: a/b/c``, or all of the task's.

        ARC, for instance, has questions with three, four and five options. A format that names anything but answers of
        the task, or lacks the right one, is ignored.
        """
        found = re.search(r"answer format:\s*(\S+)", self.instruction, re.IGNORECASE)
        offered = tuple(found[1].rstrip(".").split("/")) if found else ()
        valid = self.answer in offered and set(offered) <= set(task.answers) and len(set(offered)) == len(offered)
        return offered if valid else task.answers

    def completion(self, option: str) -> str:
        """Return the text of a model whose answer is ``option``, for scoring by likelihood.

        It is the output with its last mention of the right answer exchanged, or the option alone if the output does
        not mention it.
        """
        before, mention, after = self.output.rpartition(self.answer)
        return f"{before}{option}{after}" if mention else option


def instruction_prompt(instruction: str, given: str = "") -> str:
    """Return the prompt of an instruction and its input, up to the response marker: the shape of Alpaca's.

    The released scripts indent its lines by 16 spaces, differently in training and in evaluation; here one clean text
    serves both.
    """
    if given:
        task = "describes a task, and an input belongs to it. Write a response that completes the task."
        instruction += f"\n\n### Input:\n{given}"
    else:
        task = "describes a task. Write a response that completes it."
    return f"The instruction below {task}\n\n### Instruction:\n{instruction}\n\n### Response:\n"


def first_answer(text: str, answers: Sequence[str]) -> str | None:
    """Return the answer that occurs first in a generated text, or None.

    As in the official evaluation, case matters and an answer is found within words, too; of answers that start at the
    same index the longest is taken.
    """
    longest_first = sorted(answers, key=len, reverse=True)
    found = re.search("|".join(map(re.escape, longest_first)), text)
    return found[0] if found else None


def read_training(root: Path, name: str = "commonsense_15k") -> list[Question]:
    """Return the questions of ``commonsense_15k`` or ``commonsense_170k``, in the order of the file.

    Raises:
        UserError: The file is missing (with expected tree and source) or a record is wrong (file and line).
    """
    return _questions(root, (f"{name}.json", f"ft-training_set/{name}.json"), None)


def read_test(root: Path, name: str) -> list[Question]:
    """Return the questions of one test, in the order of the file.

    Raises:
        UserError: The file is missing, a record is wrong, or its answer is not one of the task's.
    """
    return _questions(root, (f"{name}/test.json", f"dataset/{name}/test.json"), TASKS[name])


def _questions(root: Path, names: Sequence[str], task: Task | None) -> list[Question]:
    path = first_file(root, names, TREE, SOURCE)
    questions = []
    for line, fields in read_records(path, FIELDS):
        what = next((f"{name!r} is empty" for name in FIELDS if name != "input" and not fields[name].strip()), "")
        if not what and task is not None and fields["answer"] not in task.answers:
            what = f"the answer {fields['answer'][:40]!r} is not one of {', '.join(task.answers)}"
        if what:
            raise UserError(f"{path}, line {line}: {what}. Correct the record, or download the file again")
        questions.append(Question(**fields))
    if not questions:
        raise UserError(f"{path} has no records. Download the file again")
    return questions


Split = Literal["train", "validation", "test"]

E2E_TREE = "train.txt, valid.txt and test.txt with lines 'meaning representation || reference'"
E2E_SOURCE = (
    "https://github.com/tuetschek/e2e-dataset, its tables written as such lines, "
    "or examples/NLG/data/e2e of https://github.com/microsoft/LoRA"
)


def read_e2e(root: Path, split: Split) -> list[tuple[str, str]]:
    """Return the lines of one split in their order; empty lines are left out.

    A line is a meaning representation, such as ``name : Aromi | type : pub``, and a person's text for it.

    Raises:
        UserError: The file is missing (with expected tree and source) or a line is wrong (file and line).
    """
    path = first_file(root, ("valid.txt" if split == "validation" else f"{split}.txt",), E2E_TREE, E2E_SOURCE)
    found: list[tuple[str, str]] = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        parts = [part.strip() for part in line.split("||")]
        if len(parts) != 2 or not all(parts):
            what = f"expected 'meaning representation || reference' with one '||', not {line.strip()[:60]!r}"
            raise UserError(f"{path}, line {number}: {what}. Correct the line, or download the file again")
        found.append((parts[0], parts[1]))
    if not found:
        raise UserError(f"{path} has no lines. Download the file again")
    return found


def grouped(lines: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the references of each meaning representation, wherever their lines are, in the order of the first."""
    groups: dict[str, list[str]] = {}
    for meaning, reference in lines:
        groups.setdefault(meaning, []).append(reference)
    return groups
