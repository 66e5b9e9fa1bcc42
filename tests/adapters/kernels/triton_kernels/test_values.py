"""Every kernel in Triton's interpreter against the slow equation, and a broken index must not pass."""

import importlib
import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch

from tests.adapters.kernels.triton_kernels.cases import BLOCKS, DENSE, MIXED, SHAPES, TERNARY, TOLERANCE, Shape, calls
from tests.support.products import in_one_item, marked

pytest.importorskip("triton")

FEW = [(name, list(TOLERANCE)[i % 3], i % 2 == 1) for i, name in enumerate(list(SHAPES)[:-1])]
JIT = "randlora_pl.adapters.kernels.triton_kernels.jit"


@in_one_item(("name", "dtype", "peft"), FEW)
def test_kernels_compute_the_equation(name: str, dtype: torch.dtype, peft: bool) -> None:
    for kind in (DENSE, BLOCKS, TERNARY, *([MIXED] if name.startswith(("tiny", "Qwen2")) else [])):
        for call in calls(SHAPES[name], dtype, peft, kind):
            call.check()


@pytest.mark.full
@pytest.mark.parametrize("dtype", TOLERANCE)
@in_one_item(("name", "peft"), itertools.product(SHAPES, (False, True)))
def test_kernels_compute_the_equation_everywhere(name: str, dtype: torch.dtype, peft: bool) -> None:
    for call in calls(SHAPES[name], dtype, peft, seed=1):
        call.check()


BROKEN = [
    ("stack", "p // R, p % R", "p // R, p // R"),
    ("stack", "p % N, p // N", "p // R, p % R"),
    ("stack", "k[None, :] * N + j[:, None]", "j[:, None] * R + k[None, :]"),
    ("stack", "tl.program_id(1) * N * R", "tl.program_id(1) * N"),
    ("stack", "grad_gammas + j[:, None] * small", "grad_gammas + j[:, None]"),
    ("build", "+ p[None, :], known", "+ p[None, :] + 1, known"),
    ("build", "tl.int64) * stride_out + rows", "tl.int64) * stride_out + 1 + rows"),
    ("build", "at = rows[:, None].to(tl.int64) * stride_w + cols", "at = rows[:, None].to(tl.int64) + cols"),
    ("blocks", "(row < large))[None, :]\n        part", "(row <= large))[None, :]\n        part"),
    ("blocks", "row = copy * small + first + i", "row = copy * small + i"),
    ("mix", "repeat * small + place, N * R", "place, N * R"),
    ("mix", "(p < columns)", "(p < small)"),
    ("ternary", "tl.program_id(0) * 16 * BW", "tl.program_id(0) * BW"),
    ("ternary", "16 * start + ", "start + "),
    ("ternary", "tl.program_id(1) * tokens + ", "tl.program_id(1) + "),
]
GROUPS = {"stack": DENSE, "build": DENSE, "blocks": BLOCKS, "mix": MIXED, "ternary": TERNARY}


@pytest.mark.parametrize(
    ("module", "right", "wrong"),
    marked(BROKEN, lambda row: row == next(first for first in BROKEN if first[0] == row[0])),
)
def test_broken_indices_are_noticed(
    module: str, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = importlib.import_module(JIT)
    text = Path(str(whole.__file__)).read_text(encoding="utf-8")
    assert right in text
    file = tmp_path / f"{module}_broken.py"
    file.write_text(text.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    monkeypatch.setitem(sys.modules, JIT, broken)
    shape = Shape(5, 3, 75, 140) if module in ("stack", "build") else Shape(3, 50, 150, 128)
    with pytest.raises(AssertionError):
        for peft in (False, True):
            for call in calls(shape, torch.float32, peft, only=GROUPS[module]):
                call.check()
