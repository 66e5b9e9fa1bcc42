"""The data module of labelled texts: GLUE's tasks and a user's own files."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from randlora_pl.data.catalog.registry import default_root
from randlora_pl.data.sampling.balance import balance_text
from randlora_pl.data.validate import check_balance
from randlora_pl.language.catalog import OWN_LABELLED, check_labelled
from randlora_pl.language.data.base import TokenData
from randlora_pl.language.data.sentence_batches import Sentences
from randlora_pl.language.datasets import own_files as own_examples
from randlora_pl.language.datasets.glue import TASKS, Examples, Metric, read_glue
from randlora_pl.language.datasets.sources import hold_out
from randlora_pl.language.models.tokenization import Lengths, encode_sentences
from randlora_pl.utils.errors import UserError


@dataclass(frozen=True)
class Splits:
    """The labelled texts of a run; parts that were not asked for, or that there are not, are None."""

    names: tuple[str, ...]
    train: Examples | None = None
    val: Examples | None = None
    test: Examples | None = None


class LabelledTexts(TokenData):
    """Sentences or pairs of them with classes or scores: GLUE's tasks, or your own files.

    GLUE keeps the labels of its test sets secret, so that its validation set is the test, as in the paper. Nothing is
    chosen by it: the last weights are tested, and what validates is set aside from the training samples.

    Args:
        dataset: `sst2`, `mrpc`, `cola`, `qnli`, `rte` or `stsb`; or `csv` or `jsonl`: your own train, val and test with
            columns text (or text_a and text_b) and label.
        root: Folder that holds the data (or one file to train on alone); by default the user's data folder.
        scores: Labels of your own files are numbers to predict, not classes.
        validation: Training samples that are held out for validation, if it has no file of its own. None by default:
            the paper trains on all, and takes the last weights.
        max_length: Most tokens of a sample; what is longer is cut, counted and reported.
        batch_size: Samples of a micro-batch on each device.
        eval_batch_size: Samples of an evaluation batch on each device.
        options: Options of all data, see `PlannedData`.

    Attributes:
        classnames: Name of each class, after `setup`; empty for scores.
        metric: The grade that the paper reports.
        lengths: Effect of `max_length` on each split, after `setup`.
    """

    usual_epochs = 10

    def __init__(
        self,
        *,
        dataset: str = "sst2",
        root: str | None = None,
        scores: bool = False,
        validation: int = 0,
        max_length: int = 128,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, **options)
        check_labelled(dataset)
        for name, value, least in (("validation", validation, 0), ("max_length", max_length, 4)):
            if value < least:
                raise UserError(f"--data.{name} is {value}, but must be at least {least}")
        self.own = dataset in OWN_LABELLED
        if self.own and root is None:
            raise UserError(f"The data set {dataset!r} needs --data.root: a folder with train.{dataset}, or one file")
        if scores and not self.own:
            raise UserError(f"--data.scores is for your own files; {dataset} has its own kind of labels: leave it out.")
        self.dataset = dataset
        self.root = default_root() if root is None else Path(root).expanduser()
        self.validation, self.max_length = validation, max_length
        self.scores = scores or dataset == "stsb"
        check_balance(self.balance, "scores" if self.scores else "")
        self.metric: Metric = ("pearson" if scores else "acc") if self.own else TASKS[dataset].metric
        self.classnames: list[str] = []
        self.lengths: dict[str, Lengths] = {}
        self._checked: Splits | None = None
        self._pairs = False

    # -- what the base asks for

    def setup(self, stage: str | None = None) -> None:
        """Read and encode what the stage needs, plan the draws, and warn of small classes in one's own texts."""
        super().setup(stage)
        if stage == "fit" and self.own and not self.scores:
            held = {split: some.labels.numpy() for split, some in self._held.items() if isinstance(some, Sentences)}
            self._remark(held, self.classnames)

    def read(self, learns: bool, tests: bool) -> None:
        """Read and encode what is needed."""
        self._tests_read |= tests
        splits = self._checked or self._splits(learns, tests)
        self._checked = None
        self.classnames = list(splits.names)
        if splits.train is not None:
            digest = hashlib.sha256(repr((splits.train.sentences, splits.train.labels)).encode())
            self._digest = digest.hexdigest()[:12]
        for name, examples in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
            if examples is not None:
                self._pairs = len(examples.sentences[0]) > 1
                encoded, self.lengths[name] = encode_sentences(self._tokenizer, examples.sentences, self.max_length)
                labels, classes = examples.labels, not self.scores
                self._held[name] = Sentences(encoded, labels, classes, self._tokenizer, self.pad)

    def check_test(self) -> None:
        """Read all samples, as classes are named by the training files; `read` encodes them and releases the texts."""
        self._checked, self._tests_read = self._splits(True, True), True

    # -- what the application asks for

    @property
    def longest(self) -> int:
        """Return the tokens of the longest sample that was read, after the cut."""
        return max((int(held.lengths.max()) for held in self._held.values()), default=0)

    def summary(self) -> dict[str, Any]:
        """Return flat, JSON-ready facts about the data and the run."""
        facts: dict[str, Any] = {"dataset": self.dataset, "seed": self.seed}
        facts |= {split: len(held) for split, held in self._held.items()}
        facts |= {"classes": len(self.classnames), "metric": self.metric, "max_length": self.max_length}
        facts["pairs"] = self._pairs
        facts |= {f"cut_{split}": lengths.cut for split, lengths in self.lengths.items()}
        if "train" in self._held:
            facts |= {"tokens": self._held["train"].total, "longest": self.lengths["train"].longest}
        return facts | self.run_facts()

    def summary_lines(self, facts: dict[str, Any]) -> dict[str, str]:
        """Return the lines of the start summary.

        Args:
            facts: From `summary`.
        """
        names = ", ".join(self.classnames[:5]) + (", ..." if len(self.classnames) > 5 else "")
        what = f"{len(self.classnames)} classes ({names})" if self.classnames else "scores"
        return {
            "data": f"{self.dataset}: {what}, {self.samples_in_words(facts)}{balance_text(self.balance)}",
            "tokens": f"{facts['tokens']:,} for training, {facts['tokens'] / max(1, facts['train']):.0f} a sample",
            "max length": str(self.lengths["train"]),
        }

    # -- details

    def _labels(self) -> Tensor | None:
        train = self._held["train"]
        return train.labels if self.balance and isinstance(train, Sentences) else None

    def _splits(self, learns: bool, tests: bool) -> Splits:
        return (self._own if self.own else self._glue)(learns, tests)

    def _glue(self, learns: bool, tests: bool) -> Splits:
        train = val = None
        if learns:
            train, val = self._aside(read_glue(self.root, self.dataset, "train"))
        test = read_glue(self.root, self.dataset, "validation") if tests else None
        return Splits(TASKS[self.dataset].names, train, val, test)

    def _own(self, learns: bool, tests: bool) -> Splits:
        """Read the training file for a test alone, too: it has the names of the classes."""
        files = own_examples.own_files(self.root, f".{self.dataset}")
        rows = {
            split: own_examples.read_own(file)
            for split, file in files.items()
            if split == "train" or (tests if split == "test" else learns)
        }
        names = () if self.scores else tuple(own_examples.class_names(rows["train"], files["train"]))
        found: dict[str, Examples | None] = {
            split: own_examples.scores(some) if self.scores else own_examples.class_numbers(some, names)
            for split, some in rows.items()
        }
        arities = {len(some[0].texts): files[split] for split, some in rows.items()}
        if len(arities) > 1:
            raise UserError(f"{' and '.join(map(str, arities.values()))}: one has single texts, the other pairs.")
        train, val = found["train"], found.get("val")
        assert train is not None
        if val is None:
            train, val = self._aside(train)
        return Splits(names, train if learns else None, val if learns else None, found.get("test"))

    def _aside(self, examples: Examples) -> tuple[Examples, Examples | None]:
        """Return the training and validation samples."""
        if not self.validation:
            return examples, None
        pairs = list(zip(examples.sentences, examples.labels, strict=True))
        parts = hold_out(pairs, self.validation)
        train, val = (Examples([s for s, _ in part], [v for _, v in part], examples.names) for part in parts)
        return train, val
