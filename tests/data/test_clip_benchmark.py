"""Class names and templates against those that PyPI's clip-benchmark (MIT) ships: each difference has its reason."""

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.data.catalog import PAPER, find
from tests.support.products import in_one_item

FOUND = importlib.util.find_spec("clip_benchmark")
pytestmark = pytest.mark.skipif(FOUND is None, reason="needs clip-benchmark, of the extra 'dev'")

CALLED = {
    "imagenet": "imagenet1k",
    "fgvcaircraft": "fgvc_aircraft",
    "flowers102": "flowers",
    "oxfordpets": "pets",
    "pascalvoc": "voc2007",
}
"""What clip-benchmark calls a row, where that differs."""

NO_NAMES = {
    "cars", "dtd", "resisc45", "sun397", "cifar10", "cifar100", "stl10", "food101", "caltech256", "fgvcaircraft",
    "cub200", "ucf101",
}  # fmt: skip
"""It asks torchvision's `.classes` or TFDS for these names, or lacks the dataset."""

NO_TEMPLATES = {"caltech256", "cub200", "ucf101"}
"""It lacks these datasets."""

OTHER_TEMPLATES = {
    "resisc45": "it has VTAB's 4 prompts; CLIP's own are 18",
    "svhn": "it has VTAB's 6 prompts about house numbers; the published figures use MNIST's prompt",
}

OTHER_NAMES = {
    "svhn": ("it has VTAB's words; the published figures use digits as signs", range(10)),
    "caltech101": (
        "it has CLIP's phrases and a background class; the published figures use the folder names, underscores kept",
        [
            "Faces", "Faces_easy", "Leopards", "Motorbikes", "airplanes", "car_side", "ceiling_fan", "cougar_body",
            "cougar_face", "crocodile_head", "dollar_bill", "electric_guitar", "flamingo_head", "grand_piano",
            "inline_skate", "joshua_tree", "sea_horse", "snoopy", "soccer_ball", "stop_sign", "water_lilly",
            "wild_cat", "windsor_chair", "yin_yang",
        ],
    ),
    "pascalvoc": (
        "it has the annotations' words; CLIP's own have blanks",
        ["dining table", "potted plant", "tv monitor"],
    ),
}  # fmt: skip
"""Names of ours that differ, and why."""


def shipped(file: str) -> Any:
    assert FOUND is not None and FOUND.submodule_search_locations
    return json.loads((Path(FOUND.submodule_search_locations[0]) / "datasets" / file).read_text(encoding="utf-8"))


def voc_names() -> list[str]:
    """Names in a module that would import more than is installed here."""
    assert FOUND is not None and FOUND.submodule_search_locations
    text = (Path(FOUND.submodule_search_locations[0]) / "datasets" / "voc2007.py").read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "object_categories":
            return list(ast.literal_eval(node.value))
    raise AssertionError("voc2007.py has no object_categories")


@in_one_item("name", PAPER)
def test_class_names(name: str) -> None:
    theirs = shipped("en_classnames.json") | {"voc2007": voc_names()}
    called = CALLED.get(name, name)
    assert (called not in theirs) == (name in NO_NAMES)
    if name in NO_NAMES:
        return
    ours, others = list(map(str, find(name).classnames)), list(map(str, theirs[called]))
    if name == "caltech101":
        assert others.pop(0) == "background"
    assert len(ours) == len(others)
    _, differ = OTHER_NAMES.get(name, ("", []))
    assert [one for one, other in zip(ours, others, strict=True) if one != other] == [str(word) for word in differ]


@in_one_item("name", PAPER)
def test_templates(name: str) -> None:
    theirs = shipped("en_zeroshot_classification_templates.json")
    called = CALLED.get(name, name)
    assert (called not in theirs) == (name in NO_TEMPLATES)
    if name in NO_TEMPLATES:
        return
    ours = set(find(name).templates)
    others = {template.replace("{c}", "{}") for template in theirs[called]}
    assert (ours == others) == (name not in OTHER_TEMPLATES)
    assert name not in OTHER_TEMPLATES or not ours & others
