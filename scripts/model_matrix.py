"""Measure every architecture of open_clip and timm: what adapters adapt, and if preprocessing is the library's.

    python scripts/model_matrix.py                     measure all, then write the table
    python scripts/model_matrix.py --names NAME ...    measure some names, and print their rows

Models are built on the meta device, so no weights are loaded and no memory is needed. A row is one architecture. The
hub is not asked: a text tower or tokenizer that needs it is named in the column `hub`, and not counted as checked.
"""

import argparse
import copy
import csv
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import open_clip
import timm
import torch
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from randlora_pl.adapters import Adapter, DoRA, LoRA, RandLoRA, inject
from randlora_pl.adapters.injection import Coverage, coverage
from randlora_pl.adapters.select import choose_beside
from randlora_pl.models import ImageSpec, clip_image_spec, meta_clip, meta_vit, vit_image_spec
from randlora_pl.models.catalog import MATRIX
from randlora_pl.utils.errors import UserError

METHODS: tuple[Adapter, ...] = (RandLoRA(), LoRA(), DoRA())
FAULT = "fault:"
_INJECTED: set[type[nn.Module]] = set()
_LEAST = 0.01  # frozen weights below this share of the blocks are not listed
_NAMES_OF_MODES = {"center": "shortest", "border": "longest", "squash": "squash"}


def names() -> list[tuple[str, str]]:
    """Return library and name of every architecture."""
    return [("open_clip", name) for name in open_clip.list_models()] + [("timm", name) for name in timm.list_models()]


def measure(library: str, name: str) -> dict[str, str]:
    """Return the row of an architecture."""
    return {"library": library, "name": name} | adapted(library, name) | prepared(library, name)


def adapted(library: str, name: str) -> dict[str, str]:
    """Return what the default of each method adapts, and the frozen weights; or the reason of a refusal."""
    empty = {"linear": "", "convolutions": "", **{method.method(): "" for method in METHODS}, "frozen": ""}
    hub = _hub(name) if library == "open_clip" else ""
    if hub.startswith("text tower"):
        return empty | {"hub": hub, "refused": ""}
    row = empty | {"hub": hub, "refused": ""}
    try:
        model = meta_clip(name) if library == "open_clip" else meta_vit(name)
        for method in METHODS[1:]:
            if (
                type(model) not in _INJECTED
            ):  # in other sizes of a class, the other methods differ in the selection alone
                inject(copy.deepcopy(model), method)
            row |= _shares(method, coverage(model, None, choose_beside(model, None, method, ()), ()))
        _INJECTED.add(type(model))
        report = inject(model, METHODS[0])
        row |= _shares(METHODS[0], report.coverage) | _facts(report.coverage)
    except UserError as error:
        row["refused"] = _line(error)
    except Exception as error:  # a fault of ours, which the tests find in the table
        row["refused"] = f"{FAULT} {type(error).__name__}: {_line(error)}"
    return row


def _shares(method: Adapter, covered: Coverage) -> dict[str, str]:
    if (covered.share < 0.5) != bool(covered.warning):
        raise AssertionError(f"{method.method()}: {covered.share:.0%} of the weights of the blocks, without warning")
    return {method.method(): f"{100 * covered.share:.1f}"}


def _facts(covered: Coverage) -> dict[str, str]:
    """Return the numbers of adapted layers, and the largest frozen weights."""
    total = sum(covered.frozen.values()) / (1 - covered.share) if covered.share < 1 else 1
    frozen = [f"{name} {100 * size / total:.1f}" for name, size in covered.frozen.items() if size / total > _LEAST]
    counts = re.findall(r"(\d+) of (\d+) (linear layers|convolutions)", covered.line)
    found = {words.split()[0]: f"{adapted}/{every}" for adapted, every, words in counts}
    return found | {"frozen": "; ".join(frozen)}


def prepared(library: str, name: str) -> dict[str, str]:
    """Return the number of pretrained tags, how many have the library's preprocessing, and the differences."""
    if library == "open_clip":
        tags = open_clip.list_pretrained_tags_by_model(name)
        pairs = [(tag, _clip_pair(name, tag)) for tag in tags]
    else:
        tags = [full.partition(".")[2] for full in timm.list_models(f"{name}.*", pretrained=True)]
        tags = tags or ([""] if name in timm.list_models(pretrained=True) else [])
        pairs = [(tag, _vit_pair(f"{name}.{tag}" if tag else name)) for tag in tags]
    wrong: dict[str, list[str]] = {}
    for tag, difference in pairs:
        if difference:
            wrong.setdefault(difference, []).append(tag)
    texts = [f"{difference} ({', '.join(tags)})" for difference, tags in wrong.items()]
    equal = sum(not difference for _, difference in pairs)
    return {"tags": str(len(tags)), "equal": str(equal), "different": "; ".join(texts)}


def _clip_pair(name: str, tag: str) -> str:
    theirs = merge_preprocess_dict(PreprocessCfg(), dict(open_clip.get_pretrained_cfg(name, tag)))
    size = open_clip.get_model_config(name)["vision_cfg"].get("image_size", 224)
    expected = {
        "size": size,
        "mean": theirs["mean"],
        "std": theirs["std"],
        "interpolation": theirs["interpolation"],
        "resize": theirs["resize_mode"],
        "crop_pct": 1.0,
        "fill": [theirs["fill_color"]] * 3,
    }
    return _difference(lambda: clip_image_spec(name, tag), expected)


def _vit_pair(name: str) -> str:
    theirs = resolve_data_config({}, pretrained_cfg=get_pretrained_cfg(name).to_dict())
    sides = theirs["input_size"][1:]
    expected = {
        "size": sides[0] if len(set(sides)) == 1 else sides,
        "mean": theirs["mean"],
        "std": theirs["std"],
        "interpolation": theirs["interpolation"],
        "resize": _NAMES_OF_MODES.get(theirs["crop_mode"], theirs["crop_mode"]),
        "crop_pct": theirs["crop_pct"],
        "fill": [round(255 * value) for value in theirs["mean"]] if theirs["crop_mode"] == "border" else [0, 0, 0],
    }
    return _difference(lambda: vit_image_spec(name), expected)


def _difference(ours: Any, expected: Mapping[str, Any]) -> str:
    try:
        spec: ImageSpec = ours()
    except UserError as error:
        return _line(error)
    here = {key: _text(value) for key, value in asdict(spec).items()}
    there = {key: _text(value) for key, value in expected.items()}
    wrong = [f"{key} {here[key]}, not {value}" for key, value in there.items() if here[key] != value]
    return ", ".join(wrong)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_text, value))
    return f"{value:.6g}" if isinstance(value, int | float) else str(value)


def _hub(name: str) -> str:
    """Return what of a CLIP model needs the hub."""
    text = open_clip.get_model_config(name)["text_cfg"]
    if text.get("hf_model_name"):
        return f"text tower {text['hf_model_name']}"
    return f"tokenizer {text['hf_tokenizer_name']}" if text.get("hf_tokenizer_name") else ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def main() -> None:
    """Write the table, or print the rows of some names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*")
    typed = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for library, name in names():
        if not typed.names or name in typed.names:
            rows.append(measure(library, name))
            print(f"{len(rows)}: {name}", file=sys.stderr, flush=True)
    if typed.names:
        print(json.dumps(rows, indent=1))
        return
    with MATRIX.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{MATRIX}: {len(rows)} rows")


if __name__ == "__main__":
    main()
