"""The data module of labelled texts: GLUE's tasks and a user's own files."""

from typing import Annotated, Any

from torch import Tensor

from randlora_pl.data.base import BatchSize
from randlora_pl.data.validate import check_balance
from randlora_pl.language.catalog import OWN_LABELLED, check_dataset
from randlora_pl.language.data.base import TokenData
from randlora_pl.language.data.batches import Sentences
from randlora_pl.language.datasets import own_files
from randlora_pl.language.datasets.glue import TASKS, Examples, Metric, read_glue
from randlora_pl.language.datasets.sources import hold_out
from randlora_pl.language.models.tokenization import encode_sentences
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import NotNegative, at_least


class LabelledTexts(TokenData):
    """Sentences or pairs of them with classes or scores: GLUE's tasks, or your own files.

    GLUE keeps the labels of its test sets secret, so that its validation set is the test, as in the paper. Nothing is
    chosen by it: the last weights are tested, and what validates is set aside from the training samples.

    Attributes:
        classnames: Name of each class, after `setup`; empty for scores.
        metric: The metric that the paper reports.
    """

    own_datasets = tuple(OWN_LABELLED)
    usual_epochs = 10
    limit = "max_length"

    dataset: str = "sst2"
    """`sst2`, `mrpc`, `cola`, `qnli`, `rte` or `stsb`; or `csv` or `jsonl`: your own train, val and test with columns
    text (or text_a and text_b) and label."""
    scores: bool = False
    """Labels of your own files are numbers to predict, not classes."""
    validation: Annotated[int, NotNegative] = 0
    """Training samples that are held out for validation, if it has no file of its own. None by default: the paper
    trains on all, and takes the last weights."""
    max_length: Annotated[int, at_least(4)] = 128
    """Maximum number of tokens per sample. Longer samples are truncated, and their number is logged."""
    batch_size: BatchSize = 64
    """Samples of a micro-batch on each device."""
    eval_batch_size: BatchSize = 64
    """Samples of an evaluation batch on each device."""

    def __post_init__(self) -> None:
        check_dataset(self.dataset, labelled=True)
        super().__post_init__()
        self.own = self.dataset in OWN_LABELLED
        if self.scores and not self.own:
            raise UserError(
                f"--data.scores is for your own files; {self.dataset} has labels of a fixed kind. Remove the option."
            )
        self.metric: Metric = ("pearson" if self.scores else "acc") if self.own else TASKS[self.dataset].metric
        self.scores = self.scores or self.dataset == "stsb"
        check_balance(self.balance, "scores" if self.scores else "")
        self.classnames: list[str] = [] if self.own else list(TASKS[self.dataset].names)
        self._checked: dict[str, Examples] = {}
        self._pairs = False

    def setup(self, stage: str | None = None) -> None:
        """Read and encode what the stage needs, plan the sample order, and warn of small classes in one's own texts."""
        super().setup(stage)
        if stage == "fit" and self.own and not self.scores:
            held = {split: some.labels.numpy() for split, some in self._held.items() if isinstance(some, Sentences)}
            self._remark(held, self.classnames)

    def read(self, learns: bool, tests: bool) -> None:
        """Read and encode what is needed."""
        self._tests_read |= tests
        splits, self._checked = self._checked or self._splits(learns, tests), {}
        for name, examples in splits.items():
            if name == "train":
                self._remember((examples.sentences, examples.labels))
            self._pairs = len(examples.sentences[0]) > 1
            encoded, self.lengths[name] = encode_sentences(self._tokenizer, examples.sentences, self.max_length)
            self._held[name] = Sentences(encoded, examples.labels, not self.scores, self._tokenizer, self.pad)

    def check_test(self) -> None:
        """Read all samples, as classes are named by the training files; `read` encodes them and releases the texts."""
        self._checked, self._tests_read = self._splits(True, True), True

    def examples(self) -> dict[str, Examples]:
        """Read and return the texts and labels of each split, before any encoding."""
        return self._splits(True, True)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample that was read, after the cut."""
        return max((int(held.lengths.max()) for held in self._held.values()), default=0)

    def facts(self) -> dict[str, Any]:
        """Return the kind of the labels, and the number of texts that were cut."""
        facts = {"classes": len(self.classnames), "metric": self.metric, "pairs": self._pairs}
        return facts | {f"cut_{split}": lengths.cut for split, lengths in self.lengths.items()}

    @property
    def kind(self) -> str:
        """Description of the labels."""
        names = ", ".join(self.classnames[:5]) + (", ..." if len(self.classnames) > 5 else "")
        return f"{len(self.classnames)} classes ({names}), " if self.classnames else "scores, "

    def _labels(self) -> Tensor | None:
        train = self._held["train"]
        return train.labels if not self.scores and isinstance(train, Sentences) else None

    def _splits(self, learns: bool, tests: bool) -> dict[str, Examples]:
        if self.own:
            return self._own(learns, tests)
        found = self._hold_out(read_glue(self.root, self.dataset, "train")) if learns else {}
        return found | ({"test": read_glue(self.root, self.dataset, "validation")} if tests else {})

    def _own(self, learns: bool, tests: bool) -> dict[str, Examples]:
        """Read the training file for a test alone, too: it has the names of the classes."""
        files = own_files.own_files(self.root, f".{self.dataset}")
        needed = {"train": True, "val": learns, "test": tests}
        rows = {split: own_files.read_own(file) for split, file in files.items() if needed[split]}
        arities = {len(some[0].texts): files[split] for split, some in rows.items()}
        if len(arities) > 1:
            raise UserError(f"{' and '.join(map(str, arities.values()))}: one has single texts, the other pairs.")
        if self.scores:
            found = {split: own_files.scores(some) for split, some in rows.items()}
        else:
            self.classnames = own_files.class_names(rows["train"], files["train"])
            found = {split: own_files.class_numbers(some, self.classnames) for split, some in rows.items()}
        train = found.pop("train")
        return (({"train": train} if "val" in found else self._hold_out(train)) if learns else {}) | found

    def _hold_out(self, examples: Examples) -> dict[str, Examples]:
        """Return the training and validation samples."""
        if not self.validation:
            return {"train": examples}
        parts = hold_out(list(zip(examples.sentences, examples.labels, strict=True)), self.validation)
        return {
            split: Examples([texts for texts, _ in part], [label for _, label in part], examples.names)
            for split, part in zip(("train", "val"), parts, strict=True)
        }
