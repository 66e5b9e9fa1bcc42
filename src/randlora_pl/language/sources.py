"""Sources of texts: the commonsense files, E2E's, or a user's own JSON lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from randlora_pl.language import prompt_sets
from randlora_pl.language.catalog import VALIDATION
from randlora_pl.language.prompt_sets import grouped, read_e2e
from randlora_pl.language.text_files import read_records
from randlora_pl.language.tokenization import Sample
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError

OWN = 'train.jsonl with a line such as {"prompt": "2+2=", "completion": "4"} per sample'
OWN += "; optionally val.jsonl and test.jsonl in the same format"

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Item:
    """A question of a test.

    Attributes:
        task: The test that it belongs to.
        prompt: Input of the model.
        answer: The right answer.
        answers: Words to search for in the generated text; empty: the whole text is the answer.
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
        """Return the answer in a text, None if there is none."""
        return prompt_sets.first_answer(text, self.answers) if self.answers else text.strip()

    def record(self, text: str) -> dict[str, Any]:
        """Return the entry of a text in a file of answers, JSON-ready."""
        if self.references:
            return {"test": self.task, "meaning": self.prompt, "written": text, "references": list(self.references)}
        found = self.found(text)
        asked = {"test": self.task, "prompt": self.prompt, "written": text, "found": found}
        return asked | {"answer": self.answer, "right": found == self.answer}


def read_training(dataset: str, root: Path, validation: int | None) -> tuple[list[Sample], list[Sample]]:
    """Return the training and the validation samples of a dataset.

    Args:
        dataset: Name of the dataset.
        root: Folder of the data, or one file of JSON lines.
        validation: Training samples to hold out (see `hold_out`) without a file for validation.

    Raises:
        UserError: A file is missing or wrong.
    """
    if dataset == "e2e":
        read = (read_e2e(root, "train"), read_e2e(root, "validation"))
        # completions begin with a space, as GPT-2 tokenizes words within a text
        train, val = ([Sample(meaning, f" {reference}") for meaning, reference in lines] for lines in read)
        return train, val
    if dataset == "jsonl":
        file = _training_file(root)
        train, own = _own_samples(file), file.with_name("val.jsonl")
        return (train, _own_samples(own)) if own.is_file() and file != root else hold_out(train, validation)
    questions = prompt_sets.read_training(root, dataset)
    return hold_out([Sample(each.prompt, each.output) for each in questions], validation, 42, "commonsense/validation")


def read_items(dataset: str, root: Path, tests: Sequence[str] | None) -> list[Item]:
    """Return the questions of the tests, one test after the other; E2E's meaning representations each once.

    Args:
        dataset: Name of the dataset.
        root: See `read_training`.
        tests: Commonsense tests to read, None for all.

    Raises:
        UserError: A file is missing or wrong.
    """
    if dataset == "e2e":
        groups = grouped(read_e2e(root, "test"))
        return [Item("e2e", meaning, "", references=tuple(references)) for meaning, references in groups.items()]
    if dataset == "jsonl":
        file = _training_file(root)
        own = file.with_name("test.jsonl")
        samples = _own_samples(own) if own.is_file() and file != root else []
        return [Item("test", sample.prompt, sample.completion.strip()) for sample in samples]
    items = []
    for task in map(prompt_sets.TASKS.__getitem__, prompt_sets.TASKS if tests is None else tests):
        for each in prompt_sets.read_test(root, task.name):
            options = each.options(task)
            completions = tuple(map(each.completion, options))
            items.append(Item(task.name, each.prompt, each.answer, task.answers, options, completions))
    return items


def hold_out(
    samples: list[Kind], count: int | None, seed: int = 0, stream: str = "text/validation"
) -> tuple[list[Kind], list[Kind]]:
    """Return training and validation samples, both in their order and the same ones for every seed of a run.

    Args:
        samples: All of them.
        count: Number of validation samples; None for `VALIDATION`, but at most a tenth.
        seed: Seed of the choice.
        stream: Name of the random numbers.

    Raises:
        UserError: Nothing would be left to train on.
    """
    if count is None:
        count = min(VALIDATION, len(samples) // 10)
    if count >= len(samples):
        raise UserError(
            f"{count} validation samples of {len(samples)} leave nothing to train on. Lower --data.validation"
        )
    chosen = set(rng.permutation(seed, stream, len(samples))[:count].tolist())
    learn = [sample for index, sample in enumerate(samples) if index not in chosen]
    return learn, [samples[index] for index in sorted(chosen)]


def _training_file(root: Path) -> Path:
    file = root if root.is_file() else root / "train.jsonl"
    if not file.is_file():
        raise UserError(f"{file} does not exist. Expected below --data.root: {OWN}")
    return file


def _own_samples(file: Path) -> list[Sample]:
    samples = []
    for line, fields in read_records(file, Sample._fields):
        if empty := next((name for name in Sample._fields if not fields[name]), None):
            raise UserError(f"{file}, line {line}: {empty!r} is empty. Expected: {OWN}")
        samples.append(Sample(**fields))
    if not samples:
        raise UserError(f"{file} has no records. Expected: {OWN}")
    return samples
