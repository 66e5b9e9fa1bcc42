"""Prompts and completions: commonsense (section 5.4, Table 15), the E2E challenge (B.2), and a user's own texts.

The commonsense files come from LLM-Adapters: ``commonsense_15k.json`` and ``commonsense_170k.json`` to train on and
``NAME/test.json`` for the eight tests; their prompt, and what counts as an answer, is here. E2E has one line ``meaning
representation || reference`` for each reference. Imports no PyTorch.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from randlora_pl.language.chat import Conversation, Turn, Turns, has_conversations, read_conversations, read_file
from randlora_pl.language.text_files import (
    TEXTS,
    csv_rows,
    decoded,
    first_file,
    lines_of,
    own_files,
    read_records,
    read_text,
    texts_of,
)
from randlora_pl.utils.errors import UserError

FIELDS = ("instruction", "input", "output", "answer")
TREE = "commonsense_15k.json or commonsense_170k.json, and NAME/test.json for NAME of boolq, piqa, social_i_qa, "
TREE += "hellaswag, winogrande, ARC-Easy, ARC-Challenge, openbookqa"
SOURCE = "the folders ft-training_set and dataset of https://github.com/AGI-Edgerunners/LLM-Adapters"


class Sample(NamedTuple):
    """Prompt and completion of a sample, without a space between them."""

    prompt: str
    completion: str


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

    def options(self, task: Task) -> tuple[str, ...]:
        """Return the answers that this question offers: from its line ``Answer format: a/b/c``, or all of the task's.

        ARC, for instance, has questions with three, four and five options. A format with anything but answers of
        the task, or lacks the right one, is ignored.
        """
        match = re.search(r"answer format:\s*(\S+)", self.instruction, re.IGNORECASE)
        offered = tuple(match[1].rstrip(".").split("/")) if match else ()
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


def read_questions(root: Path, name: str = "commonsense_15k") -> list[Question]:
    """Return the questions of a training set, ``commonsense_15k`` or ``commonsense_170k``, or of a test, in its order.

    Raises:
        UserError: The file is missing (with expected tree and source), a record is wrong (file and line), or its answer
            is not one of the test's.
    """
    task = TASKS.get(name)
    names = (f"{name}.json", f"ft-training_set/{name}.json")
    if task is not None:
        names = (f"{name}/test.json", f"dataset/{name}/test.json")
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


E2E_TREE = "train.txt, valid.txt and test.txt with lines 'meaning representation || reference'"
E2E_SOURCE = (
    "https://github.com/tuetschek/e2e-dataset, its tables written as such lines, "
    "or examples/NLG/data/e2e of https://github.com/microsoft/LoRA"
)


def read_e2e(root: Path, split: Literal["train", "validation", "test"]) -> list[tuple[str, str]]:
    """Return the lines of one split in their order; empty lines are left out.

    A line is a meaning representation, such as ``name : Aromi | type : pub``, and a person's text for it.

    Raises:
        UserError: The file is missing (with expected tree and source) or a line is wrong (file and line).
    """
    path = first_file(root, ("valid.txt" if split == "validation" else f"{split}.txt",), E2E_TREE, E2E_SOURCE)
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(lines_of(read_text(path)), 1):
        if not line.strip():
            continue
        parts = [part.strip() for part in line.split("||")]
        if len(parts) != 2 or not all(parts):
            what = f"expected 'meaning representation || reference' with one '||', not {line.strip()[:60]!r}"
            raise UserError(f"{path}, line {number}: {what}. Correct the line, or download the file again")
        pairs.append((parts[0], parts[1]))
    if not pairs:
        raise UserError(f"{path} has no lines. Download the file again")
    return pairs


OWN = 'a line such as {"prompt": "2+2=", "completion": "4"} per sample'

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Item:
    """A question of a test.

    Attributes:
        task: The test that it belongs to.
        prompt: Input of the model, or of a conversation the last message before the answer.
        answer: The right answer.
        answers: Words to search for in the generated text; empty: the whole text is the answer.
        options: The answers that this question offers.
        completions: Text of the model for each option.
        references: Texts written by people; all texts of such a test are scored together, none alone.
        chat: The conversation that the answer ends, which is the model's input in its chat template.
    """

    task: str
    prompt: str
    answer: str
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    completions: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    chat: Conversation | None = None

    def find_answer(self, text: str) -> str | None:
        """Return the answer that occurs first in a generated text, None if there is none.

        As in the official evaluation, case matters and an answer is found within words, too; of answers that start at
        the same index the longest is taken.
        """
        if not self.answers:
            return text.strip()
        match = re.search("|".join(map(re.escape, sorted(self.answers, key=len, reverse=True))), text)
        return match[0] if match else None

    def record(self, text: str) -> dict[str, Any]:
        """Return the entry of a text in a file of answers, JSON-ready."""
        if self.references:
            return {"test": self.task, "meaning": self.prompt, "written": text, "references": list(self.references)}
        answer = self.find_answer(text)
        asked: dict[str, Any] = {"test": self.task, "prompt": self.prompt}
        if self.chat is not None:
            asked = {"test": self.task, "messages": [turn._asdict() for turn in self.chat.turns[:-1]]}
        asked |= {"written": text, "found": answer}
        return asked | {"answer": self.answer, "right": answer == self.answer}


def read_chats(root: Path, validation: int | None) -> tuple[list[Conversation], list[Conversation]]:
    """Return the user's training and validation conversations, which `read_training` describes."""
    train, val = read_conversations(root, "train"), read_conversations(root, "val")
    return (train, val) if val else hold_out(train, validation)


def read_training(dataset: str, root: Path, validation: int | None) -> tuple[list[Sample], list[Sample]]:
    """Return the training and the validation samples of a dataset below a folder, or of one file of JSON lines.

    Without a file for validation, ``validation`` training samples are held out (see `hold_out`).

    Raises:
        UserError: A file is missing or wrong.
    """
    if dataset == "e2e":
        read = (read_e2e(root, "train"), read_e2e(root, "validation"))
        # completions begin with a space, as GPT-2 tokenizes words within a text
        train, val = ([Sample(meaning, f" {reference}") for meaning, reference in lines] for lines in read)
        return train, val
    if dataset == "jsonl":
        train, val = _own_samples(root, "train"), _own_samples(root, "val")
        return (train, val) if val else hold_out(train, validation)
    questions = read_questions(root, dataset)
    samples = [Sample(instruction_prompt(each.instruction, each.input), each.output) for each in questions]
    return hold_out(samples, validation, 42, "commonsense/validation")


def read_items(dataset: str, root: Path, tests: Sequence[str] | None) -> list[Item]:
    """Return the questions of the tests, one test after the other; E2E's meaning representations each once.

    Of the commonsense tests, only those in ``tests`` are read, or all if it is None.

    Raises:
        UserError: A file is missing or wrong.
    """
    if dataset == "e2e":
        groups: dict[str, list[str]] = {}  # wherever the lines of one are, in the order of the first
        for meaning, reference in read_e2e(root, "test"):
            groups.setdefault(meaning, []).append(reference)
        return [Item("e2e", meaning, "", references=tuple(references)) for meaning, references in groups.items()]
    if dataset == "jsonl":
        return [Item("test", each.prompt, each.completion.strip()) for each in _own_samples(root, "test")]
    if dataset == "chat":
        chats = read_conversations(root, "test")
        return [Item("test", each.turns[-2].content, each.turns[-1].content.strip(), chat=each) for each in chats]
    items = []
    for task in map(TASKS.__getitem__, TASKS if tests is None else tests):
        for each in read_questions(root, task.name):
            options = each.options(task)
            completions = tuple(map(each.completion, options))
            prompt = instruction_prompt(each.instruction, each.input)
            items.append(Item(task.name, prompt, each.answer, task.answers, options, completions))
    return items


def hold_out(
    samples: list[Kind], count: int | None, seed: int = 0, stream: str = "text/validation"
) -> tuple[list[Kind], list[Kind]]:
    """Return training and validation samples, both in their order and the same ones for every seed of a run.

    There are ``count`` validation samples, or if it is None 120, as in the released scripts, but at most a tenth. The
    choice depends on its own seed and stream of random numbers alone.

    Raises:
        UserError: Nothing would be left to train on.
    """
    if count is None:
        count = min(120, len(samples) // 10)
    if count >= len(samples):
        raise UserError(
            f"{count} validation samples of {len(samples)} leave nothing to train on. Lower --data.validation"
        )
    from randlora_pl.utils import rng  # listing the datasets does without PyTorch

    chosen = set(rng.permutation(seed, stream, len(samples))[:count].tolist())
    learn = [sample for index, sample in enumerate(samples) if index not in chosen]
    return learn, [samples[index] for index in sorted(chosen)]


def _own_samples(root: Path, split: str) -> list[Sample]:
    file = own_files(root, ".jsonl", OWN).get(split)
    if file is None:
        return []
    samples = []
    for line, fields in read_records(file, Sample._fields):
        if empty := next((name for name in Sample._fields if not fields[name]), None):
            raise UserError(f"{file}, line {line}: {empty!r} is empty. Expected: {OWN}")
        samples.append(Sample(**fields))
    if not samples:
        raise UserError(f"{file} has no records. Expected: {OWN}")
    return samples


PROMPTS = ("prompt", "instruction", "input")
"""Fields of a decoder's records; an instruction and its input are named as in the commonsense files."""
SENTENCES = tuple(dict.fromkeys(name for names in TEXTS for name in names))
"""Fields of a classifier's records."""
_LINE = "line"


@dataclass(frozen=True)
class Given:
    """One text: its location, and its fields; a plain line is its own only field. Or the turns of a conversation."""

    where: str
    fields: dict[str, str]
    turns: Turns = ()


def read_given(source: str, names: Sequence[str]) -> list[Given]:
    """Return the texts of one file in its order; empty lines are left out.

    Args:
        source: A .txt file with a text a line, a .jsonl or .json file of records, a .csv file with a header, or
            ``-`` for standard input, which is read as lines.
        names: The fields to take, `PROMPTS` or `SENTENCES`; the others, such as labels, are left out.

    Raises:
        UserError: It is missing, empty, of another kind, or a line is wrong; the message has file and line.
    """
    path = Path(source)
    kind = path.suffix.lower()
    if source == "-":
        source, kind = "standard input", ".txt"
        text = decoded(sys.stdin.buffer.read(), source)
    elif not path.is_file():
        what = "is a folder: give its files" if path.is_dir() else "does not exist"
        raise UserError(f"--texts: {path} {what}.")
    elif kind == ".txt":
        text = read_text(path)
    if kind == ".txt":
        rows = [(number, {_LINE: line}) for number, line in enumerate(lines_of(text), 1) if line.strip()]
    elif kind in (".jsonl", ".json"):
        if names == PROMPTS and has_conversations(path):
            return [Given(chat.where, {}, chat.asked) for chat in read_file(path)]
        rows = read_records(path, (), optional=names)
    elif kind == ".csv":
        rows = [(line, {name: row[name] for name in names if name in row}) for line, row in csv_rows(path)]
    else:
        raise UserError(
            f"--texts: {path} is not a .txt, .jsonl or .csv file; rename it, or pass its lines with: --texts - < {path}"
        )
    if not rows:
        raise UserError(f"{source} has no text.")
    return [Given(f"{source}, line {line}", fields) for line, fields in rows]


def shown(given: Given) -> str:
    """Return a decoder's text as the user gave it, of a conversation the last message, for the file of answers."""
    if given.turns:
        return given.turns[-1].content
    fields = given.fields
    asked = fields.get("instruction", fields.get(_LINE, "")) + (f"\n\n{more}" if (more := fields.get("input")) else "")
    return fields.get("prompt", asked)


def prompt_of(given: Given, dataset: str) -> str | Turns:
    """Return a decoder's prompt, exactly as in its training; for one of conversations their turns.

    A field ``prompt`` is the prompt. An instruction has the template of the commonsense files around it. A plain line
    is an instruction for models of the commonsense files, for E2E a meaning representation (before ``||``), else a
    prompt. For models of conversations, prompts and plain lines are messages of the user.

    Args:
        given: The user's text.
        dataset: Training data of the decoder; empty if it is unknown.

    Raises:
        UserError: It has no such field, the field is empty, or the decoder knows no instructions.
    """
    fields, commonsense = given.fields, dataset.startswith("commonsense")
    if given.turns:
        if dataset != "chat":
            what = "'messages' is for models that were trained on conversations (--data.dataset chat)"
            raise UserError(f"{given.where}: {what}; give 'prompt'.")
        return given.turns
    name = next((name for name in ("prompt", "instruction", _LINE) if name in fields), None)
    if name is None:
        raise UserError(f"{given.where}: 'prompt' is missing.")
    if name == "instruction" and not commonsense:
        raise UserError(
            f"{given.where}: 'instruction' is for models that were trained on the commonsense files, with their "
            "template; give 'prompt'."
        )
    text = fields[name].partition("||")[0].strip() if name == _LINE and dataset == "e2e" else fields[name]
    if not text.strip():
        raise UserError(f"{given.where}: the prompt is empty. Fill it, or delete the record.")
    if dataset == "chat":
        return (Turn("user", text),)
    return instruction_prompt(text, fields.get("input", "")) if commonsense and name != "prompt" else text


def sentences_of(given: Given) -> tuple[str, ...]:
    """Return a classifier's text, or pair of texts; refuse missing and empty ones."""
    texts = texts_of(given.where, given.fields, ((_LINE,), *TEXTS))
    if texts is None:
        raise UserError(f"{given.where}: 'text' (or 'text_a' and 'text_b') is missing.")
    return texts
