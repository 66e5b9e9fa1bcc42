"""CoOp's versions of datasets: the split files of nine of them, and the prompts of all.

Zhou et al., Learning to Prompt for Vision-Language Models (arXiv 2109.01134). ImageNet and Aircraft have no split file:
their images stay as they are, and so do ImageNet's shifted test sets.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from randlora_pl.data.catalog.spec import DatasetSpec, counts
from randlora_pl.data.catalog.templates import FLOWER, FOOD, PET, PHOTO
from randlora_pl.utils.errors import UserError

SPLITS = ("default", "coop")
"""Names of the splits: the dataset's usual one is the default."""

PAGE = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
COPY = "https://huggingface.co/datasets/zhengli97/prompt_learning_dataset"


@dataclass(frozen=True)
class SplitFile:
    """Split file of a dataset.

    Attributes:
        file: Path of the JSON file below the root.
        images: Folder below the root that its paths start from.
        classes: Number of classes.
        counts: Expected images by split.
    """

    file: str
    images: str
    classes: int
    counts: Mapping[str, int]


FILES = {
    "caltech101": SplitFile(
        "caltech101/split_zhou_Caltech101.json", "caltech101/101_ObjectCategories", 100, counts(4_128, 1_649, 2_465)
    ),
    "oxfordpets": SplitFile(
        "oxford-iiit-pet/split_zhou_OxfordPets.json", "oxford-iiit-pet/images", 37, counts(2_944, 736, 3_669)
    ),
    "cars": SplitFile("stanford_cars/split_zhou_StanfordCars.json", "stanford_cars", 196, counts(6_509, 1_635, 8_041)),
    "flowers102": SplitFile(
        "flowers-102/split_zhou_OxfordFlowers.json", "flowers-102/jpg", 102, counts(4_093, 1_633, 2_463)
    ),
    "food101": SplitFile("food-101/split_zhou_Food101.json", "food-101/images", 101, counts(50_500, 20_200, 30_300)),
    "sun397": SplitFile("SUN397/split_zhou_SUN397.json", "SUN397", 397, counts(15_880, 3_970, 19_850)),
    "dtd": SplitFile("dtd/split_zhou_DescribableTextures.json", "dtd/dtd/images", 47, counts(2_820, 1_128, 1_692)),
    "eurosat": SplitFile("eurosat/split_zhou_EuroSAT.json", "eurosat/2750", 10, counts(13_500, 5_400, 8_100)),
    "ucf101": SplitFile("ucf101/split_zhou_UCF101.json", "ucf101/UCF-101-midframes", 101, counts(7_639, 1_898, 3_783)),
}

_PROMPTS = {
    "oxfordpets": PET,
    "flowers102": FLOWER,
    "fgvcaircraft": ("a photo of a {}, a type of aircraft.",),
    "food101": FOOD,
    "dtd": ("{} texture.",),
    "eurosat": ("a centered satellite photo of {}.",),
    "ucf101": ("a photo of a person doing {}.",),
}

_AS_THEY_ARE = ("imagenet", "fgvcaircraft")

MOST_VALIDATION_SHOTS = 4
"""Validation images of each class in few-shot runs, or the shots if these are fewer."""


def has_coop(row: DatasetSpec) -> bool:
    """Return True if there is a version of CoOp of a dataset, or if it tests the classes of one."""
    return row.name in FILES or row.name in _AS_THEY_ARE or row.trains_on in _AS_THEY_ARE


def with_split(row: DatasetSpec, split: str) -> DatasetSpec:
    """Return a dataset with another split: its files, class names, counts and prompts.

    Args:
        row: Specification of the dataset.
        split: ``default`` for the same, or ``coop``.

    Raises:
        UserError: The dataset does not have this split.
    """
    if split == "default":
        return row
    if not has_coop(row):
        known = ", ".join([*FILES, *_AS_THEY_ARE])
        what = f"--data.split coop: {row.name} does not have this split. Remove the option"
        raise UserError(f"{what}. Datasets that have it: {known}")
    row = replace(row, templates=_PROMPTS.get(row.name, PHOTO))
    if row.name not in FILES:
        return row
    found = FILES[row.name]
    top, _, below = found.images.partition("/")
    beside = found.file.partition("/")[2]
    return replace(
        row,
        reader="randlora_pl.data.readers.lists:split_file",
        classnames=(),
        class_count=found.classes,
        counts=found.counts,
        options={"file": found.file, "images": found.images},
        layout=f"{top}/{{{beside},{below + '/' if below else ''}...}}",
        files=(),
        by_hand=(),
        note="CoOp's split, class names and prompt",
    )
