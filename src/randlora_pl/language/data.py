"""The data modules of texts, encoded once and handed over in numbered batches: labelled ones, and prompts."""

import hashlib
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from torch import Tensor

from randlora_pl.data.base import BatchSize, Part, PlannedData, word_part
from randlora_pl.data.catalog import default_root
from randlora_pl.data.loader import Loader, TrainSchedule
from randlora_pl.language import glue, text_files
from randlora_pl.language.batches import Sentences, TextEvalBatches, TextSamples, TextTrainBatches, Tokens, pack
from randlora_pl.language.catalog import OWN_LABELLED, OWN_TEXTS, check_dataset
from randlora_pl.language.chat_template import ChatTemplate, encode_chats
from randlora_pl.language.metrics import need_scorers
from randlora_pl.language.prompt_sets import TASKS, Item, hold_out, read_chats, read_items, read_training
from randlora_pl.language.tokenization import Encoded, Lengths, encode, encode_prompt, encode_sentences, keep, pad_id
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.options import NotNegative, at_least


class TokenData(PlannedData):
    """Base of the data modules of texts. Subclasses read and encode.

    Attributes:
        root: Folder that holds the data (or one file to train on alone); by default the user's data folder.
        own_datasets: Names of datasets of the user's own files.
        usual_epochs: Default number of passes over the training samples.
        limit: Name of the option with the most tokens of a sample.
        lengths: Effect of the limit on the encoded samples by split, after `setup`.
        pad: Number to pad with, after `setup`.
    """

    own_datasets: ClassVar[tuple[str, ...]] = ()
    usual_epochs = 3
    limit: ClassVar[str]

    dataset: str
    """Name of the dataset."""
    if TYPE_CHECKING:  # it becomes a path; docstring_parser reads no texts below an `if`
        root: Any = None
    else:
        root: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        scores = getattr(self, "scores", False) or self.dataset == "stsb"
        self._check_run("scores" if scores else "")
        if self.dataset in self.own_datasets and self.root is None:
            file = f"train.{OWN_TEXTS[self.dataset]}"
            raise UserError(f"The dataset {self.dataset!r} needs --data.root: a folder with {file}, or one file")
        self.epochs = self.usual_epochs if self.epochs is self.steps is None else self.epochs
        self.root = default_root() if self.root is None else Path(self.root).expanduser()
        self.lengths: dict[str, Lengths] = {}
        self._tokenizer: Any = None
        self._held: dict[str, TextSamples] = {}  # encoded samples by split
        self.pad = 0
        self._digest = ""  # of the training texts
        self._tests_read = False  # or looked for in vain

    # -- what a subclass gives

    def read(self, learns: bool, tests: bool) -> None:
        """Read and encode the training and validation samples, the test samples, or both.

        Raises:
            UserError: They are missing or wrong.
        """
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Return the facts of `summary` that only this kind of texts has."""
        raise NotImplementedError

    def parts(self) -> dict[str, Part]:
        """Return what all processes of a job must have in common."""
        return {f"{split} samples": held.part() for split, held in self._held.items()}

    @property
    def kind(self) -> str:
        """Description of the labels for the start summary, with a comma at its end."""
        return ""

    # -- what Lightning calls

    def setup(self, stage: str | None = None) -> None:
        """Read and encode what the stage needs, and plan the sample order.

        Raises:
            UserError: The data are missing or wrong, or the tokenizer is missing.
        """
        task = self.learner
        self._tokenizer = getattr(task, "vocabulary", self._tokenizer)
        if self._tokenizer is None:
            raise UserError("texts need the tokenizer of a language task: use --model CausalLMTask.")
        if not self._held:
            self.pad = pad_id(self._tokenizer)  # once, as it may log a message
        learns = stage in ("fit", "validate", None) and "train" not in self._held
        tests = stage in ("test", "predict", None) and "test" not in self._held
        if learns or tests:
            self.read(learns, tests)
        self._compare(self.parts)
        if stage in ("fit", None):
            self._plan(len(self._held["train"]), self._labels())

    def train_dataloader(self) -> Loader:
        """Return the training batches of this rank, from the trainer's optimizer step on."""
        schedule = self._schedule()
        return Loader(self.batches(schedule), self._start(len(schedule)), self.num_workers or 0, self.skipped)

    def batches(self, schedule: TrainSchedule, search: bool = False) -> TextTrainBatches:
        """Return the numbered training batches of a schedule."""
        labels = self._labels()
        weights = None if labels is None else self._class_weights(labels, int(labels.max()) + 1)
        return TextTrainBatches(self._held["train"], schedule, weights)

    def val_dataloader(self) -> Loader | list[Loader]:
        """Return the validation batches of this rank; empty if no samples were held out."""
        return self._eval("val")

    def test_dataloader(self) -> Loader | list[Loader]:
        """Return the test batches of this rank, the longest first; ``index`` has the numbers of the samples."""
        return self._eval("test")

    def state_dict(self) -> dict[str, Any]:
        """Return the planned sample order and the samples, so that a resumed run detects another plan."""
        return {} if self.plan is None else super().state_dict() | {"samples": self._digest}

    # -- used by the application

    def summary(self) -> dict[str, Any]:
        """Return flat, JSON-ready facts about the data and the run; splits that were not read are omitted."""
        facts: dict[str, Any] = {"dataset": self.dataset, "seed": self.seed}
        facts |= {split: len(held) for split, held in self._held.items()}
        facts |= self.facts() | {self.limit: getattr(self, self.limit)}
        if "train" in self._held:
            facts |= {"tokens": int(self._held["train"].lengths.sum()), "longest": self.lengths["train"].longest}
        return facts | self.run_facts()

    def summary_lines(self, facts: dict[str, Any]) -> dict[str, str]:
        """Return the start summary's lines about the data, from the result of `summary`."""
        splits = ", ".join(f"{facts[split]:,} {split}" for split in ("train", "val", "test") if split in facts)
        absent = self._tests_read and "test" not in facts
        none = f"; none to test (no test.{OWN_TEXTS[self.dataset]} in --data.root)" if absent else ""
        return {
            "data": f"{self.dataset}: {self.kind}{splits} samples{none}{self.notes}",
            "tokens": f"{facts['tokens']:,} for training, {facts['tokens'] / max(1, facts['train']):.0f} a sample",
            self.limit.replace("_", " "): str(self.lengths["train"]),
        }

    # -- for subclasses

    def _labels(self) -> Tensor | None:
        """Return the classes (samples,) of the training samples, or None without classes."""
        return None

    def _eval(self, split: str) -> Loader | list[Loader]:
        if split not in self._held:
            return []
        held = self._held[split]
        batches = TextEvalBatches(held, self._eval_schedule(len(held)), held.by_length())
        return Loader(batches, 0, self.num_workers or 0, self.skipped)


class LabelledTexts(TokenData):
    """Sentences or pairs of them with classes or scores: GLUE's tasks, or your own files.

    GLUE keeps the labels of its test sets secret, so its validation set is the test, as in the paper. It chooses
    nothing: the last weights are tested, and validation samples are held out from the training samples.

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
        self.metric: glue.Metric = (
            ("pearson" if self.scores else "acc") if self.own else glue.TASKS[self.dataset].metric
        )
        self.scores = self.scores or self.dataset == "stsb"
        self.classnames: list[str] = [] if self.own else list(glue.TASKS[self.dataset].names)
        self._checked: dict[str, text_files.Examples] = {}
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
        splits, self._checked = self._checked or self.examples(learns, tests), {}
        for name, examples in splits.items():
            if name == "train":
                texts = repr((examples.sentences, examples.labels))
                self._digest = hashlib.sha256(texts.encode()).hexdigest()[:12]
            self._pairs = len(examples.sentences[0]) > 1
            encoded, self.lengths[name] = encode_sentences(self._tokenizer, examples.sentences, self.max_length)
            self._held[name] = Sentences(encoded, examples.labels, not self.scores, self._tokenizer, self.pad)

    def check_test(self) -> None:
        """Read all samples, as classes are named by the training files; `read` encodes them and releases the texts."""
        self._checked, self._tests_read = self.examples(), True

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

    def examples(self, learns: bool = True, tests: bool = True) -> dict[str, text_files.Examples]:
        """Read and return the texts and labels of each split, before any encoding."""
        if not self.own:
            given = self._hold_out(glue.read_glue(self.root, self.dataset, "train")) if learns else {}
            return given | ({"test": glue.read_glue(self.root, self.dataset, "validation")} if tests else {})
        files = text_files.own_files(self.root, f".{self.dataset}", text_files.COLUMNS)
        needed = {"train": True, "val": learns, "test": tests}  # training files have the names of the classes
        rows = {split: text_files.read_own(file) for split, file in files.items() if needed[split]}
        arities = {len(some[0].texts): files[split] for split, some in rows.items()}
        if len(arities) > 1:
            raise UserError(f"{' and '.join(map(str, arities.values()))}: one has single texts, the other pairs.")
        if self.scores:
            by_split = {split: text_files.scores(some) for split, some in rows.items()}
        else:
            self.classnames = text_files.class_names(rows["train"], files["train"])
            by_split = {split: text_files.class_numbers(some, self.classnames) for split, some in rows.items()}
        train = by_split.pop("train")
        return (({"train": train} if "val" in by_split else self._hold_out(train)) if learns else {}) | by_split

    def _hold_out(self, examples: text_files.Examples) -> dict[str, text_files.Examples]:
        if not self.validation:
            return {"train": examples}
        parts = hold_out(list(zip(examples.sentences, examples.labels, strict=True)), self.validation)
        return {
            split: text_files.Examples([texts for texts, _ in part], [label for _, label in part])
            for split, part in zip(("train", "val"), parts, strict=True)
        }


class TextData(TokenData):
    """Prompts with completions: what is trained on, in which order, and how they become tokens.

    Attributes:
        items: The questions of the tests, after `check_test` or `setup`; ``index`` of a test batch has their numbers.
    """

    own_datasets = ("jsonl", "chat")
    limit = "cutoff"

    dataset: str = "commonsense_15k"
    """`commonsense_15k` or `commonsense_170k` with the eight tests, `e2e`: train.txt, valid.txt and test.txt with lines
    'meaning || reference', or your own train.jsonl, val.jsonl and test.jsonl (or one file to train on alone): `jsonl`
    with prompts and completions, `chat` with conversations (messages), in the model's chat template."""
    tests: list[str] | None = None
    """Commonsense tests to evaluate, for example `[boolq, piqa]`. Default: all eight."""
    validation: Annotated[int, NotNegative] | None = None
    """Training samples that are held out for validation, if it has no file of its own. Default: 120, as in the paper's
    scripts, but at most a tenth."""
    cutoff: Annotated[int, at_least(2)] = 256
    """Maximum number of tokens per sample. Longer samples are truncated, and their number is logged."""
    mask_prompt: bool | None = None
    """Learn the completion only, or the answers of a chat. Default: only for e2e and chat. Otherwise the loss covers
    the whole text, as in the paper's scripts."""
    packing: bool = False
    """Join short training samples to rows of up to ``cutoff`` tokens, which need little padding. The samples of a row
    do not see each other. A row counts as one sample of a batch."""
    batch_size: BatchSize = 16
    """Samples of a micro-batch on each device."""
    eval_batch_size: BatchSize = 16
    """Samples of an evaluation batch on each device."""
    balance: None = field(init=False, default=None)

    def __post_init__(self) -> None:
        check_dataset(self.dataset)
        super().__post_init__()
        if self.tests is not None and not self.dataset.startswith("commonsense"):
            file = "test.txt" if self.dataset == "e2e" else "test.jsonl"
            raise UserError(
                f"--data.tests chooses among the commonsense tests; {self.dataset} has one, {file}. Remove the option."
            )
        for test in self.tests or ():
            if test not in TASKS:
                raise UserError(f"--data.tests: unknown {test!r}.{near(test, TASKS)} Known: {', '.join(TASKS)}")
        if self.tests is not None and (not self.tests or len(set(self.tests)) < len(self.tests)):
            raise UserError(f"--data.tests is {self.tests}: list each test once, or remove the option for all tests")
        # As the scripts that E2E's come from: an end of text after the meaning representation, and no loss on it.
        self.separate = self.dataset == "e2e"
        self.chats = self.dataset == "chat"
        self.mask_prompt = self.separate or self.chats if self.mask_prompt is None else self.mask_prompt
        self.items: list[Item] = []
        self._joined = 0  # training samples, of which a row has several with packing

    def read(self, learns: bool, tests: bool) -> None:
        """Read and encode what is needed."""
        if learns:
            limit, masked = self.cutoff, bool(self.mask_prompt)
            if self.chats:
                chats = read_chats(self.root, self.validation)
                text = repr(chats[0])
                parts = [keep(encode_chats(self._tokenizer, some, limit, masked), limit) for some in chats]
            else:
                samples = read_training(self.dataset, self.root, self.validation)
                text = repr(samples[0])
                parts = [keep(encode(self._tokenizer, some, limit, masked, self.separate), limit) for some in samples]
            self._digest = hashlib.sha256(text.encode()).hexdigest()[:12]
            (train, self.lengths["train"]), (val, _) = parts
            if not train:
                raise UserError(f"No training sample has a token to learn within --data.cutoff {limit}. Raise it")
            self._joined = len(train)
            train = pack(train, limit) if self.packing else train
            self._held |= {split: Tokens(kept, self.pad) for split, kept in (("train", train), ("val", val)) if kept}
            if self.chats:  # what the template refuses of the questions is reported before the training
                self._questions()
        if tests:
            self.check_test()
            if self.items:
                prompts = self._questions()
                if empty := sum(not ids for ids in prompts):
                    raise UserError(f"{empty:,} of {len(prompts):,} prompts of the tests have no token")
                self._held["test"] = Tokens((Encoded(ids, ids, len(ids)) for ids in prompts), self.pad, "left")

    def _questions(self) -> list[list[int]]:
        """Return the tokens of the tests' prompts; answers of conversations become what the template makes of them."""
        prompts, template = [], ChatTemplate(self._tokenizer) if self.chats else None
        for number, item in enumerate(self.items):
            if item.chat is None or template is None:
                prompts.append(encode_prompt(self._tokenizer, item.prompt, self.separate))
                continue
            ids, answer = template.asked(item.chat)
            prompts.append(ids)
            self.items[number] = replace(item, answer=answer)
        return prompts

    def parts(self) -> dict[str, Part]:
        """Return the samples, and the questions with what scores them."""
        return super().parts() | {"test questions": word_part([repr(item) for item in self.items])}

    def check_test(self) -> None:
        """Read the questions, which are kept for the test, and look for what scores them."""
        self._tests_read = True
        self.items = self.items or read_items(self.dataset, self.root, self.tests)
        if any(item.references for item in self.items):
            need_scorers()  # not only when everything has been written

    def facts(self) -> dict[str, Any]:
        """Return the number of questions, which are encoded after the training, and the effect of the cutoff."""
        cut = {split: {"cut": lengths.cut, "dropped": lengths.dropped} for split, lengths in self.lengths.items()}
        tests = {"test": len(self.items)} if self.items else {}
        rows = {"train": self._joined, "rows": len(self._held["train"])} if self.packing and self._joined else {}
        return tests | rows | {"mask_prompt": self.mask_prompt} | cut.get("train", {})

    def summary_lines(self, facts: dict[str, Any]) -> dict[str, str]:
        """Return the start summary's lines about the data."""
        lines = super().summary_lines(facts)
        lines["tokens"] += "; completions are learned" if self.mask_prompt else "; prompts and completions are learned"
        if "rows" in facts:
            full = 100 * facts["tokens"] / (facts["rows"] * self.cutoff)
            joined = f"{facts['train']:,} samples are joined to {facts['rows']:,} rows, {full:.0f} % full"
            lines["packing"] = f"{joined}; a batch has rows in place of samples"
        return lines
