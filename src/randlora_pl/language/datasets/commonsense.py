"""The instruction files of the commonsense experiments and what counts as an answer (paper: section 5.4, Table 15).

The files come from LLM-Adapters: ``commonsense_15k.json`` and ``commonsense_170k.json`` to train on and
``NAME/test.json`` for the eight tests.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from randlora_pl.language.datasets.text_files import first_file, read_records
from randlora_pl.utils.errors import UserError, near

FIELDS = ("instruction", "input", "output", "answer")
TREE = "commonsense_15k.json or commonsense_170k.json, and NAME/test.json for NAME of boolq, piqa, social_i_qa, "
TREE += "hellaswag, winogrande, ARC-Easy, ARC-Challenge, openbookqa"
SOURCE = "the folders ft-training_set and dataset of https://github.com/AGI-Edgerunners/LLM-Adapters"


@dataclass(frozen=True)
class Task:
    """One of the eight tests.

    Attributes:
        name: Name of its folder.
        title: Name in the paper's tables.
        answers: The words that can be answered, in the order of the options.
    """

    name: str
    title: str
    answers: tuple[str, ...]


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, count + 1))


TASKS = {
    task.name: task
    for task in (
        Task("boolq", "BoolQ", ("true", "false")),
        Task("piqa", "PIQA", _numbered("solution", 2)),
        Task("social_i_qa", "SIQA", _numbered("answer", 5)),
        Task("hellaswag", "HellaSwag", _numbered("ending", 4)),
        Task("winogrande", "WinoGrande", _numbered("option", 2)),
        Task("ARC-Easy", "ARC-e", _numbered("answer", 5)),
        Task("ARC-Challenge", "ARC-c", _numbered("answer", 5)),
        Task("openbookqa", "OBQA", _numbered("answer", 5)),
    )
}


@dataclass(frozen=True)
class Question:
    """One record: what is asked, the text to learn, and the word in it that is scored.

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

    def options(self, task: Task) -> tuple[str, ...]:
        """Return the answers that this question offers: from its line ``Answer format: a/b/c``, or all of the task's.

        ARC, for instance, has questions with three, four and five options. A format that names anything but answers of
        the task, or lacks the right one, is not believed.
        """
        found = re.search(r"answer format:\s*(\S+)", self.instruction, re.IGNORECASE)
        offered = tuple(found[1].rstrip(".").split("/")) if found else ()
        believed = self.answer in offered and set(offered) <= set(task.answers) and len(set(offered)) == len(offered)
        return offered if believed else task.answers

    def completion(self, option: str) -> str:
        """Return the text of a model whose answer is ``option``, for scoring by likelihood.

        It is the output with its last mention of the right answer exchanged, or the option alone where the output does
        not mention it.
        """
        before, mention, after = self.output.rpartition(self.answer)
        return f"{before}{option}{after}" if mention else option


def read_training(root: Path, name: str = "commonsense_15k") -> list[Question]:
    """Return the questions of ``commonsense_15k`` or ``commonsense_170k``, in the order of the file.

    Raises:
        UserError: The file is missing (with expected tree and source) or a record is wrong (file and line).
    """
    path = first_file(root, (f"{name}.json", f"ft-training_set/{name}.json"), TREE, SOURCE)
    return _questions(path, None)


def read_test(root: Path, name: str) -> list[Question]:
    """Return the questions of one test, in the order of the file.

    Raises:
        UserError: The test is unknown, the file is missing, a record is wrong, or its answer is not one of the task's.
    """
    if name not in TASKS:
        raise UserError(f"Unknown commonsense test {name!r}.{near(name, TASKS)} Known: {', '.join(TASKS)}")
    path = first_file(root, (f"{name}/test.json", f"dataset/{name}/test.json"), TREE, SOURCE)
    return _questions(path, TASKS[name])


def _questions(path: Path, task: Task | None) -> list[Question]:
    records = read_records(path, FIELDS)
    if not records:
        raise UserError(f"{path} holds no record. Get the file again")
    return [_question(path, *record, task) for record in records]


def _question(path: Path, line: int, fields: dict[str, str], task: Task | None) -> Question:
    """Return a checked record.

    Raises:
        UserError: A text is empty, or no exact match with the answer would be possible.
    """
    for field in ("instruction", "output", "answer"):
        if not fields[field].strip():
            raise UserError(f"{path}, line {line}: {field!r} is empty. Mend the record, or get the file again")
    if task is not None and fields["answer"] not in task.answers:
        what = f"the answer {fields['answer'][:40]!r} is none of {', '.join(task.answers)}"
        raise UserError(f"{path}, line {line}: {what}. Mend the record, or get the file again")
    return Question(**fields)
