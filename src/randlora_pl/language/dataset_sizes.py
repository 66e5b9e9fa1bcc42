"""How large the data sets of texts are, for estimates before any of them is read."""

from dataclasses import dataclass

OWN_TEXTS = ("jsonl", "csv")
"""Data sets of a user's own texts, which nobody has counted and which only their place tells apart."""

TESTS = {
    "boolq": 3270, "piqa": 1838, "social_i_qa": 1954, "hellaswag": 10042, "winogrande": 1267, "ARC-Easy": 2376,
    "ARC-Challenge": 1172, "openbookqa": 500,
}  # fmt: skip
"""Questions of each commonsense test, as LLM-Adapters hands them out."""

VALIDATION = 120
"""Training samples of prompts that validate where nothing is said and no file does, as in the released scripts."""


@dataclass(frozen=True)
class Size:
    """The size of one data set.

    Attributes:
        train: Training samples.
        test: Samples that are tested; GLUE's are its validation sets.
        tokens: Tokens of a sample, roughly; padding is not counted.
        epochs: Epochs of the paper.
        aside: Training samples that validate where nothing is said.
    """

    train: int
    test: int
    tokens: int
    epochs: int
    aside: int = 0


_QUESTIONS = 128
"""Half of the scripts' cutoff: an assumption, for want of the tokenizers."""

SIZES = {
    "commonsense_15k": Size(15_000, sum(TESTS.values()), _QUESTIONS, 3, VALIDATION),
    "commonsense_170k": Size(170_000, sum(TESTS.values()), _QUESTIONS, 3, VALIDATION),
    "sst2": Size(67_349, 872, 128, 10),  # GLUE: the scripts pad every sample to 128
    "mrpc": Size(3_668, 408, 128, 10),
    "cola": Size(8_551, 1_043, 128, 10),
    "qnli": Size(104_743, 5_463, 128, 10),
    "rte": Size(2_490, 277, 128, 10),
    "stsb": Size(5_749, 1_500, 128, 10),
    "e2e": Size(42_061, 630, 64, 5),  # a text for each of the test's meaning representations
}
