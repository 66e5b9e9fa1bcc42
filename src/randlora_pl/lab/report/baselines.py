"""Results of plain classifiers that a sweep measured beside its methods."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from randlora_pl.utils.adapter_schema import check_arguments
from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.files.documents import parse_json

FILE = "baselines.json"
"""File of them in the folder of a sweep, and of its report."""
MOST = 16_000_000
"""Largest number of pixel values of the training images: with more, as many images as fit are drawn."""
SIDE = 32
"""Height and width that larger images, and images of several sizes, are reduced to."""


@dataclass(frozen=True)
class Baseline:
    """Result of a plain classifier.

    Attributes:
        score: Test accuracy from 0 to 1; of scores the correlation.
        train: Training samples that it saw.
        of: Training samples that the methods saw.
    """

    dataset: str
    budget: str
    seed: int
    name: str
    score: float
    train: int
    of: int


def read_baselines(folder: Path, warn: Callable[[str], None]) -> list[Baseline]:
    """Return the baselines in the folder of a sweep or report; none where the file is missing or damaged."""
    try:
        rows = parse_json((folder / FILE).read_text(encoding="utf-8"))
        for row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"{brief(row)} is not a result")
            check_arguments(Baseline, row, FILE)
        return [one for one in (Baseline(**row) for row in rows) if -1 <= one.score <= 1]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, UserError) as error:
        warn(f"{FILE} is cut off or damaged ({error})")
        return []
