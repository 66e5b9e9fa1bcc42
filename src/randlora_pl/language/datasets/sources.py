"""Sources of texts: the commonsense files, E2E's, or a user's own JSON lines."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from randlora_pl.language.dataset_sizes import VALIDATION
from randlora_pl.language.datasets import commonsense
from randlora_pl.language.datasets.answer_matching import first_answer
from randlora_pl.language.datasets.e2e import SPLITS, grouped, read_e2e
from randlora_pl.language.datasets.prompt_template import Template
from randlora_pl.language.datasets.text_files import read_records
from randlora_pl.language.models.tokenization import Sample
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError

OWN = 'train.jsonl with a line such as {"prompt": "2+2=", "completion": "4"} for each sample'
OWN += "; val.jsonl and test.jsonl alike, as you like"
FIELDS = ("prompt", "completion")

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Item:
    """A question of a test.

    Attributes:
        task: The test that it belongs to.
        prompt: Input of the model.
        answer: The right answer.
        answers: The words that are looked for in what it writes; empty: the whole text is the answer.
        options: The answers that this question offers.
        completions: Text of the model for each option.
        references: Texts written by people; all texts of such a test are scored together, none alone.
    """

    task: str
    prompt: str
    answer: str
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    completions: tuple[str, ...] = ()
    references: tuple[str, ...] = ()

    def grade(self, text: str) -> tuple[bool, bool]:
        """Return two flags: the text holds the right answer, and it holds an answer at all."""
        found = self.found(text)
        return found == self.answer, bool(found)

    def found(self, text: str) -> str | None:
        """Return the answer in a text, None where there is none."""
        return first_answer(text, self.answers) if self.answers else text.strip()

    def record(self, text: str) -> dict[str, Any]:
        """Return the entry of a text in a file of answers, JSON-ready."""
        if self.references:
            return {"test": self.task, "meaning": self.prompt, "written": text, "references": list(self.references)}
        found = self.found(text)
        asked = {"test": self.task, "prompt": self.prompt, "written": text, "found": found}
        return asked | {"answer": self.answer, "right": found == self.answer}


@dataclass(frozen=True)
class Texts:
    """All texts of a run; parts that were not asked for are empty.

    Attributes:
        train: Training samples.
        val: Validation samples.
        items: Questions of all tests, one test after the other.
    """

    train: list[Sample] = field(default_factory=list)
    val: list[Sample] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)


def read_texts(
    dataset: str, root: Path, validation: int | None, tests: Sequence[str] | None, train: bool, test: bool
) -> Texts:
    """Read what is needed.

    Args:
        dataset: Name of the dataset.
        root: Folder of the data.
        validation: Training samples that are set aside for validation; None for `VALIDATION`, but at most a tenth.
        tests: The tests to read, None for all.
        train: Whether training and validation samples are needed.
        test: Whether the tests are.

    Raises:
        UserError: A file is missing or wrong.
    """
    if dataset == "jsonl":
        return _own(root, validation, tests, train, test)
    if dataset == "e2e":
        return _e2e(root, tests, train, test)
    template = Template()
    questions = commonsense.read_training(root, dataset) if train else []
    samples = [Sample(template.prompt(each.instruction, each.input), each.output) for each in questions]
    learn, hold = hold_out(samples, validation, 42, "commonsense/validation") if train else ([], [])
    names = list(commonsense.TASKS) if tests is None else tests
    items = [
        _item(commonsense.TASKS[name], question, template)
        for name in (names if test else ())
        for question in commonsense.read_test(root, name)
    ]
    return Texts(learn, hold, items)


def _item(task: commonsense.Task, question: commonsense.Question, template: Template) -> Item:
    options = question.options(task)
    prompt = template.prompt(question.instruction, question.input)
    completions = tuple(question.completion(option) for option in options)
    return Item(task.name, prompt, question.answer, task.answers, options, completions)


def _e2e(root: Path, tests: Sequence[str] | None, train: bool, test: bool) -> Texts:
    """Return E2E's lines for training, and its meaning representations, each once with all references, for tests."""
    if tests is not None:
        raise UserError("--data.tests chooses among the commonsense tests; e2e has one, test.txt: leave it out.")
    learn, hold = (
        [Sample(line.meaning, line.completion) for line in read_e2e(root, split)] if train else [] for split in SPLITS
    )
    groups = grouped(read_e2e(root, "test")) if test else {}
    items = [Item("e2e", meaning, "", references=tuple(references)) for meaning, references in groups.items()]
    return Texts(learn, hold, items)


def _own(root: Path, validation: int | None, tests: Sequence[str] | None, train: bool, test: bool) -> Texts:
    """Return a folder of JSON lines, or one file to train on alone."""
    folder, file = (root.parent, root) if root.is_file() else (root, root / "train.jsonl")
    if tests is not None:
        raise UserError("--data.tests chooses among the commonsense tests; jsonl has one, test.jsonl: leave it out.")
    if not file.is_file():
        raise UserError(f"{file} does not exist. Expected below --data.root: {OWN}")
    learn: list[Sample] = []
    hold: list[Sample] = []
    if train:
        learn = [_sample(*record, file) for record in _own_records(file)]
        if (folder / "val.jsonl").is_file() and file != root:
            hold = [_sample(*record, folder / "val.jsonl") for record in _own_records(folder / "val.jsonl")]
        else:
            learn, hold = hold_out(learn, validation)
    items: list[Item] = []
    if test and file != root and (folder / "test.jsonl").is_file():
        items = [_own_item(*record, folder / "test.jsonl") for record in _own_records(folder / "test.jsonl")]
    return Texts(learn, hold, items)


def hold_out(
    samples: list[Kind], count: int | None, seed: int = 0, stream: str = "text/validation"
) -> tuple[list[Kind], list[Kind]]:
    """Return training and validation samples, the same ones for every seed of a run.

    Args:
        samples: All of them.
        count: Number of validation samples; None for `VALIDATION`, but at most a tenth.
        seed: Chooses them, with their number and the stream alone.
        stream: Name of the random numbers.

    Returns:
        Both parts in the order of the samples.

    Raises:
        UserError: Nothing would be left to train on.
    """
    if count is None:
        count = min(VALIDATION, len(samples) // 10)
    if count >= len(samples):
        raise UserError(
            f"{count} validation samples of {len(samples)} leave nothing to train on: lower --data.validation"
        )
    chosen = set(rng.permutation(seed, stream, len(samples))[:count].tolist())
    learn = [sample for place, sample in enumerate(samples) if place not in chosen]
    return learn, [samples[place] for place in sorted(chosen)]


def _own_records(file: Path) -> list[tuple[int, dict[str, str]]]:
    records = read_records(file, FIELDS)
    if not records:
        raise UserError(f"{file} holds no record. Expected: {OWN}")
    return records


def _sample(line: int, fields: dict[str, str], file: Path) -> Sample:
    for name in FIELDS:
        if not fields[name]:
            raise UserError(f"{file}, line {line}: {name!r} is empty. Expected: {OWN}")
    return Sample(fields["prompt"], fields["completion"])


def _own_item(line: int, fields: dict[str, str], file: Path) -> Item:
    prompt, completion = _sample(line, fields, file)
    return Item("test", prompt, completion.strip())
