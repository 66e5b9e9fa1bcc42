"""The data module of texts: what is trained on, in which order, and how it becomes tokens."""

import hashlib
import logging
from pathlib import Path
from typing import Any

from randlora_pl.data.catalog.registry import default_root
from randlora_pl.language.catalog import check_dataset
from randlora_pl.language.data.base import TokenData
from randlora_pl.language.data.batches import Tokens
from randlora_pl.language.datasets.commonsense import TASKS
from randlora_pl.language.datasets.sources import Item, Texts, read_texts
from randlora_pl.language.metrics.text_scores import need_scorers
from randlora_pl.language.models.tokenization import Encoded, Lengths, encode_all, encode_prompt
from randlora_pl.utils.errors import UserError, near

log = logging.getLogger("randlora_pl")


class TextData(TokenData):
    """Prompts with completions: what is trained on, in which order, and how they become tokens.

    Args:
        dataset: `commonsense_15k` or `commonsense_170k` with the eight tests, `e2e`: train.txt, valid.txt and test.txt
            with lines 'meaning || reference', or `jsonl`: your own prompts and completions in train.jsonl, val.jsonl
            and test.jsonl (or one file to train on alone).
        root: Folder that holds the data; by default the user's data folder.
        tests: Commonsense tests to evaluate, for example `[boolq, piqa]`; by default all eight.
        validation: Training samples that are held out for validation, if it has no file of its own. By default 120,
            as in the paper's scripts, but at most a tenth.
        cutoff: Most tokens of a sample; what is longer is cut, counted and reported.
        mask_prompt: Learn the completion only. By default e2e's alone; else the loss looks at the whole text, as in the
            paper's scripts.
        batch_size: Samples of a micro-batch on each device.
        eval_batch_size: Samples of an evaluation batch on each device.
        options: Options of all data, see `PlannedData`.

    Attributes:
        items: The questions of the tests, after `check_test` or `setup`; ``index`` of a test batch has their numbers.
        lengths: Effect of the cutoff on the training samples, after `setup("fit")`.
        pad: Number to pad with, after `setup`.
    """

    fixed_options = ("balance",)

    def __init__(
        self,
        *,
        dataset: str = "commonsense_15k",
        root: str | None = None,
        tests: list[str] | None = None,
        validation: int | None = None,
        cutoff: int = 256,
        mask_prompt: bool | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        **options: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, balance=None, **options)
        check_dataset(dataset)
        for name, value, least in (("validation", validation or 0, 0), ("cutoff", cutoff, 2)):
            if value < least:
                raise UserError(f"--data.{name} is {value}, but must be at least {least}")
        for test in tests or ():
            if dataset.startswith("commonsense") and test not in TASKS:
                raise UserError(f"--data.tests: unknown {test!r}.{near(test, TASKS)} Known: {', '.join(TASKS)}")
        if tests is not None and (not tests or len(set(tests)) < len(tests)):
            raise UserError(f"--data.tests is {tests}: name each test once, or leave it out for all of them")
        self.dataset, self.tests = dataset, tests
        self.root = default_root() if root is None else Path(root).expanduser()
        if dataset == "jsonl" and root is None:
            raise UserError("The data set 'jsonl' needs --data.root: a folder with train.jsonl, or one such file")
        self.validation, self.cutoff = validation, cutoff
        # As the scripts that E2E's come from: an end of text after the meaning representation, and no loss on it.
        self.separate = dataset == "e2e"
        self.mask_prompt = self.separate if mask_prompt is None else mask_prompt
        self.items: list[Item] = []
        self.lengths: Lengths | None = None

    # -- what the base asks for

    def read(self, learns: bool, tests: bool) -> None:
        """Read and encode what is needed."""
        if learns:
            self._learn(read_texts(self.dataset, self.root, self.validation, self.tests, True, False))
        if tests:
            self.check_test()
            if self.items:
                prompts = [encode_prompt(self._tokenizer, item.prompt, self.separate) for item in self.items]
                if empty := sum(not ids for ids in prompts):
                    raise UserError(f"{empty:,} of {len(prompts):,} prompts of the tests have no token")
                self._held["test"] = Tokens((Encoded(ids, ids, len(ids)) for ids in prompts), self.pad)

    def check_test(self) -> None:
        """Read the questions, which are kept for the test, and look for what scores them."""
        self._tests_read = True
        if not self.items:
            self.items = read_texts(self.dataset, self.root, self.validation, self.tests, False, True).items
        if any(item.references for item in self.items):
            need_scorers()  # not only when everything has been written

    # -- what the application asks for

    def summary(self) -> dict[str, Any]:
        """Return flat, JSON-ready facts about the data and the run."""
        facts: dict[str, Any] = {"dataset": self.dataset, "seed": self.seed}
        facts |= {split: len(held) for split, held in self._held.items()}
        facts |= {"test": len(self.items)} if self.items else {}  # which are encoded after the training
        facts |= {"cutoff": self.cutoff, "mask_prompt": self.mask_prompt}
        if self.lengths is not None:
            facts |= {"tokens": self._held["train"].total, "cut": self.lengths.cut, "dropped": self.lengths.dropped}
            facts |= {"longest": self.lengths.longest}
        return facts | self.run_facts()

    def summary_lines(self, facts: dict[str, Any]) -> dict[str, str]:
        """Return the lines of the start summary.

        Args:
            facts: From `summary`.
        """
        each = facts["tokens"] / max(1, facts["train"])
        learned = "completions are learned" if self.mask_prompt else "prompts and completions are learned"
        return {
            "data": f"{self.dataset}: {self.samples_in_words(facts)}",
            "tokens": f"{facts['tokens']:,} for training, {each:.0f} a sample; {learned}",
            "cutoff": str(self.lengths),
        }

    # -- details

    def _learn(self, texts: Texts) -> None:
        digest = hashlib.sha256(repr(texts.train).encode())
        self._digest = digest.hexdigest()[:12]
        how = (self.cutoff, self.mask_prompt, self.separate)
        encoded, self.lengths = encode_all(self._tokenizer, texts.train, *how)
        if not encoded:
            raise UserError(f"No training sample keeps a token to learn in --data.cutoff {self.cutoff}: raise it")
        self._held["train"] = Tokens(encoded, self.pad)
        if texts.val:
            self._held["val"] = Tokens(encode_all(self._tokenizer, texts.val, *how)[0], self.pad)
