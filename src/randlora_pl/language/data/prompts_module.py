"""The data module of prompts and completions."""

from dataclasses import field
from typing import Annotated, Any

from randlora_pl.data.base import BatchSize
from randlora_pl.data.parts import Part, word_part
from randlora_pl.language.catalog import check_dataset
from randlora_pl.language.data.base import TokenData
from randlora_pl.language.data.batches import Tokens
from randlora_pl.language.datasets.commonsense import TASKS
from randlora_pl.language.datasets.sources import Item, read_items, read_training
from randlora_pl.language.metrics import need_scorers
from randlora_pl.language.models.tokenization import Encoded, encode_all, encode_prompt
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.options import NotNegative, at_least


class TextData(TokenData):
    """Prompts with completions: what is trained on, in which order, and how they become tokens.

    Attributes:
        items: The questions of the tests, after `check_test` or `setup`; ``index`` of a test batch has their numbers.
    """

    own_datasets = ("jsonl",)
    limit = "cutoff"

    dataset: str = "commonsense_15k"
    """`commonsense_15k` or `commonsense_170k` with the eight tests, `e2e`: train.txt, valid.txt and test.txt with lines
    'meaning || reference', or `jsonl`: your own prompts and completions in train.jsonl, val.jsonl and test.jsonl (or
    one file to train on alone)."""
    tests: list[str] | None = None
    """Commonsense tests to evaluate, for example `[boolq, piqa]`. Default: all eight."""
    validation: Annotated[int, NotNegative] | None = None
    """Training samples that are held out for validation, if it has no file of its own. Default: 120, as in the paper's
    scripts, but at most a tenth."""
    cutoff: Annotated[int, at_least(2)] = 256
    """Maximum number of tokens per sample. Longer samples are truncated, and their number is logged."""
    mask_prompt: bool | None = None
    """Learn the completion only. Default: only for e2e. Otherwise the loss covers the whole text, as in the paper's
    scripts."""
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
            raise UserError(f"--data.tests is {self.tests}: name each test once, or remove the option for all tests")
        # As the scripts that E2E's come from: an end of text after the meaning representation, and no loss on it.
        self.separate = self.dataset == "e2e"
        self.mask_prompt = self.separate if self.mask_prompt is None else self.mask_prompt
        self.items: list[Item] = []

    def read(self, learns: bool, tests: bool) -> None:
        """Read and encode what is needed."""
        if learns:
            train, val = read_training(self.dataset, self.root, self.validation)
            self._remember(train)
            how = {"mask_prompt": bool(self.mask_prompt), "separate": self.separate}
            encoded, self.lengths["train"] = encode_all(self._tokenizer, train, self.cutoff, **how)
            if not encoded:
                raise UserError(f"No training sample has a token to learn within --data.cutoff {self.cutoff}. Raise it")
            self._held["train"] = Tokens(encoded, self.pad)
            if val:
                self._held["val"] = Tokens(encode_all(self._tokenizer, val, self.cutoff, **how)[0], self.pad)
        if tests:
            self.check_test()
            if self.items:
                prompts = [encode_prompt(self._tokenizer, item.prompt, self.separate) for item in self.items]
                if empty := sum(not ids for ids in prompts):
                    raise UserError(f"{empty:,} of {len(prompts):,} prompts of the tests have no token")
                self._held["test"] = Tokens((Encoded(ids, ids, len(ids)) for ids in prompts), self.pad, "left")

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
        cut = {split: {"cut": found.cut, "dropped": found.dropped} for split, found in self.lengths.items()}
        tests = {"test": len(self.items)} if self.items else {}
        return tests | {"mask_prompt": self.mask_prompt} | cut.get("train", {})

    def summary_lines(self, facts: dict[str, Any]) -> dict[str, str]:
        """Return the start summary's lines about the data."""
        lines = super().summary_lines(facts)
        lines["tokens"] += "; completions are learned" if self.mask_prompt else "; prompts and completions are learned"
        return lines
