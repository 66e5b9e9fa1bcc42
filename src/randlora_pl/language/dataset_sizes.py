"""Sizes of the data sets of texts, for estimates before any of them is read."""

from dataclasses import dataclass

OWN_TEXTS = ("jsonl", "csv")
"""Data sets of a user's own texts, of unknown size, which differ by their path only."""

TESTS = {
    "boolq": 3270, "piqa": 1838, "social_i_qa": 1954, "hellaswag": 10042, "winogrande": 1267, "ARC-Easy": 2376,
    "ARC-Challenge": 1172, "openbookqa": 500,
}  # fmt: skip
"""Questions of each commonsense test, as LLM-Adapters hands them out."""

VALIDATION = 120
"""Default number of training prompts held out for validation without a file of its own (released scripts)."""


@dataclass(frozen=True)
class Size:
    """The size of one data set.

    Attributes:
        train: Training samples.
        test: Samples that are tested; GLUE's are its validation sets.
        epochs: Epochs of the paper.
        aside: Default number of training samples held out for validation.
    """

    train: int
    test: int
    epochs: int
    aside: int = 0


SIZES = {
    "commonsense_15k": Size(15_000, sum(TESTS.values()), 3, VALIDATION),
    "commonsense_170k": Size(170_000, sum(TESTS.values()), 3, VALIDATION),
    "sst2": Size(67_349, 872, 10),
    "mrpc": Size(3_668, 408, 10),
    "cola": Size(8_551, 1_043, 10),
    "qnli": Size(104_743, 5_463, 10),
    "rte": Size(2_490, 277, 10),
    "stsb": Size(5_749, 1_500, 10),
    "e2e": Size(42_061, 630, 5),  # a text for each of the test's meaning representations
}
