"""Writes the splits that ship with the package: EuroSAT's 270 validation and 270 test images of each class.

    python scripts/write_split_indices.py

The images are not needed: the files are called ``CLASS/CLASS_N.jpg``, with N from 1 to the size of the class.
"""

import json
import re

import numpy as np

from randlora_pl.data import splits
from randlora_pl.data.formats.trees import INDICES
from randlora_pl.data.readers import numbers_of

EUROSAT = {
    "AnnualCrop": 3000,
    "Forest": 3000,
    "HerbaceousVegetation": 3000,
    "Highway": 2500,
    "Industrial": 2500,
    "Pasture": 2000,
    "PermanentCrop": 2500,
    "Residential": 3000,
    "River": 2500,
    "SeaLake": 3000,
}
EACH = 270


def eurosat() -> dict[str, dict[str, list[int]]]:
    """The numbers of the validation and test images of each class."""
    entries = [(name, number) for name, size in EUROSAT.items() for number in range(1, size + 1)]
    labels = np.repeat(np.arange(len(EUROSAT)), list(EUROSAT.values()))
    numbers = numbers_of([f"{name}/{name}_{number}.jpg" for name, number in entries])
    # subsets of one seed are nested: the first 270 of each class are for testing, the next 270 for validation
    test = set(splits.few_shot(labels, numbers, EACH, splits.SPLIT_SEED).tolist())
    both = set(splits.few_shot(labels, numbers, 2 * EACH, splits.SPLIT_SEED).tolist())
    parts = {"val": sorted(both - test), "test": sorted(test)}
    return {
        part: {name: [entries[place][1] for place in places if entries[place][0] == name] for name in EUROSAT}
        for part, places in parts.items()
    }


def main() -> None:
    for name, parts in {"eurosat": eurosat()}.items():
        text = json.dumps(parts, indent=1)
        text = re.sub(r"\[[^\]]*\]", lambda found: json.dumps(json.loads(found[0])), text)  # a class a line
        (INDICES / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
