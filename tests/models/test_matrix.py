"""The table of all architectures: rows counted by hand, its counts in the docs, and the installed versions."""

import itertools
import json
import re
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import open_clip
import pytest

from randlora_pl.models.catalog import matrix
from tests.support.cli import Run
from tests.support.scripts import load_script

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "model_matrix.md").read_text(encoding="utf-8")
ROWS = {(row["library"], row["name"]): row for row in matrix()}


def script() -> ModuleType:
    return load_script("model_matrix")


@pytest.fixture
def measured_versions() -> None:
    if f"open_clip {version('open_clip_torch')} and timm {version('timm')}" not in PAGE:
        pytest.skip("the table is of other versions of open_clip and timm")


def _vit(blocks: int) -> tuple[str, str, float]:
    """q, k, v (3 d x d) and MLP (2 x 4 d x d) of blocks that also have an output projection (d x d)."""
    return f"{3 * blocks}/{4 * blocks}", "0/1", 11 / 12


def _convnext(depths: list[int], dims: list[int]) -> tuple[str, str, float]:
    """Two linear layers (4 d x d) and a depthwise 7 x 7 convolution per block; 2 x 2 convolutions between stages."""
    linear = sum(8 * depth * dim**2 for depth, dim in zip(depths, dims, strict=True))
    depthwise = sum(49 * depth * dim for depth, dim in zip(depths, dims, strict=True))
    between = sum(4 * before * after for before, after in itertools.pairwise(dims))
    return "36/36", "0/22", linear / (linear + depthwise + between)


VIT = ("timm", "vit_base_patch16_224")
BY_HAND = {
    ("open_clip", "ViT-B-32"): _vit(12 + 12),
    ("timm", "vit_tiny_patch16_224"): _vit(12),
    # with a table of 732 positions for each of 12 heads
    ("timm", "beit_base_patch16_224"): ("36/48", "0/1", 11 * 768**2 / (12 * 768**2 + 732 * 12)),
    ("timm", "mixer_b16_224"): ("48/48", "0/1", 1.0),  # 12 blocks of two MLPs
    ("timm", "convnext_tiny"): _convnext([3, 3, 9, 3], [96, 192, 384, 768]),
    ("timm", "resnet18"): ("", "19/20", 1.0),  # 16 in blocks, 3 shortcuts and the stem
}


@pytest.mark.usefixtures("measured_versions")
def test_rows_counted_by_hand() -> None:
    for key, (linear, convolutions, share) in BY_HAND.items():
        row = ROWS[key]
        counted = (linear, convolutions, f"{100 * share:.1f}")
        assert (row["linear"], row["convolutions"], row["RandLoRA"]) == counted, key
        assert row["tags"] == row["equal"] and not row["refused"] + row["different"]


@pytest.mark.usefixtures("measured_versions")
def test_rows_are_measured_again() -> None:
    measure = script().measure
    for key in [("timm", "resnet18"), ("timm", "tnt_s_patch16_224")]:
        assert measure(*key) == ROWS[key]


@pytest.mark.usefixtures("measured_versions")
def test_every_architecture_has_a_row_without_a_fault() -> None:
    module = script()
    own = {path.stem for path in Path(open_clip.__file__).parent.glob("model_configs/*.json")}  # other tests add some
    assert [key for key in module.names() if key[0] == "timm" or key[1] in own] == list(ROWS)
    assert not [key for key, row in ROWS.items() if row["refused"].startswith(module.FAULT)]
    for key, row in ROWS.items():
        assert row["RandLoRA"] or row["refused"] or row["hub"].startswith("text tower"), key


def test_the_page_has_the_counts_of_the_table() -> None:
    rows = ROWS.values()
    tags, equal = (sum(int(row[column]) for row in rows) for column in ("tags", "equal"))
    adapted = [row for row in rows if row["RandLoRA"]]
    low = [row for row in adapted if min(float(row[name]) for name in ("RandLoRA", "LoRA", "DoRA")) < 50]
    hub = [row for row in rows if row["hub"]]
    towers = [row for row in hub if row["hub"].startswith("text tower")]
    counts = {
        "architectures": len(rows),
        "adapted": len(adapted),
        "with a warning": len(low),
        "refused": sum(bool(row["refused"]) for row in rows),
        "text tower not checked without the hub": len(towers),
        "tokenizer not checked without the hub": len(hub) - len(towers),
        "pretrained weights": tags,
        "with the library's preprocessing": equal,
        "with another preprocessing": tags - equal,
    }
    there = dict(re.findall(r"^\| ([a-z' ]+) \| ([\d,]+) \|$", PAGE, re.MULTILINE))
    assert {name: int(count.replace(",", "")) for name, count in there.items()} == counts


def test_the_command_prints_rows(run: Run) -> None:
    assert json.loads(run("models", "--all", "--json").out) == matrix()
    both = json.loads(run("models", "--all", "convnext_base", "vit_base_patch16_224.augreg_in1k", "--json").out)
    assert both == [ROWS[key] for key in [("open_clip", "convnext_base"), ("timm", "convnext_base"), VIT]]
    assert "See: randlora-pl models --all" in run("models", "--all", "nonsense").err
    out = run("models", "--all", "fastvit_mci2", "vit_base_patch14_dinov2").out
    assert "18.9 / 18.9 / 18.9" in out and "0 of 1" in out
    assert "not checked without the hub: text tower" in run("models", "--all", "roberta-ViT-B-32").out
    tokenizer = next(row for row in ROWS.values() if row["hub"].startswith("tokenizer") and row["frozen"])
    out = " ".join(run("models", "--all", tokenizer["name"]).out.split())
    assert "not checked without the hub: tokenizer" in out and tokenizer["frozen"].split()[0] in out


@pytest.mark.full
@pytest.mark.usefixtures("measured_versions")
def test_the_whole_table_is_of_the_installed_versions() -> None:
    measure = script().measure
    assert [measure(*key) for key in ROWS] == list(ROWS.values())
