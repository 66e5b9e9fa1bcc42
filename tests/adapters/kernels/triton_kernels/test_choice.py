"""Which implementation runs: by device, dtype and one environment variable."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from randlora_pl.adapters.kernels import triton_kernels
from randlora_pl.adapters.kernels.hadamard import Hadamard
from randlora_pl.adapters.kernels.triton_kernels import multiplies
from randlora_pl.utils import device
from randlora_pl.utils.device import choose_as_on_cuda, runs
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item

HERE = torch.zeros(2)
with FakeTensorMode():
    CUDA = torch.empty(2, device="cuda")


def chosen(monkeypatch: pytest.MonkeyPatch, value: str, interpreted: bool, kind: str = "cpu", has: bool = True) -> bool:
    monkeypatch.setattr(device, "VALUE", value)
    monkeypatch.setattr(device, "INTERPRETED", interpreted)
    monkeypatch.setattr(device, "INSTALLED", has)
    return runs(HERE if kind == "cpu" else CUDA, torch.bfloat16)


@in_one_item(
    ("value", "interpreted", "kind", "has", "expected"),
    [
        ("auto", False, "cpu", True, False),
        ("1", False, "cpu", True, False),
        ("auto", True, "cpu", True, False),  # the interpreter is for tests that ask for it
        ("1", True, "cpu", True, True),
        ("auto", False, "cuda", True, True),
        ("0", False, "cuda", True, False),
        ("1", False, "cuda", True, True),
        ("auto", True, "cuda", False, True),  # only traced: PyTorch for CUDA brings triton
    ],
)
def test_the_device_and_the_variable_choose(
    value: str, interpreted: bool, kind: str, has: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen(monkeypatch, value, interpreted, kind, has) is expected


def test_dtypes_choose_and_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, "auto", False, "cuda")
    assert not runs(CUDA, torch.float64) and not multiplies(CUDA, torch.float32)
    assert multiplies(CUDA, torch.float16)
    assert Hadamard(CUDA, 4096, 4096, 1).held and not Hadamard(CUDA, 257, 257, 1).held
    assert chosen(monkeypatch, "1", False, "cuda") and multiplies(CUDA, torch.float32)
    with pytest.raises(UserError, match=r"RANDLORA_PL_TRITON is 'yes'. Set 0 or 1"):
        chosen(monkeypatch, "yes", False, "cuda")
    with pytest.raises(UserError, match=r"triton is not installed. Run `pip install triton`"):
        chosen(monkeypatch, "1", False, "cuda", has=False)
    with choose_as_on_cuda():  # a CPU that is treated as a GPU cannot run kernels
        assert not chosen(monkeypatch, "auto", False)


def test_triton_is_not_imported_before_a_kernel_runs() -> None:
    code = "import sys, randlora_pl.adapters; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tiles_that_do_not_fit_are_left_out() -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    tried: list[int] = []

    def run(tile: int) -> None:
        tried.append(tile)
        if tile > 2:
            raise errors.OutOfResources(tile, 2, "shared memory")

    key = ("test",)
    triton_kernels._first_that_fits(key, (8, 4, 2, 1), run)
    triton_kernels._first_that_fits(key, (8, 4, 2, 1), run)
    assert tried == [8, 4, 2, 2]
    triton_kernels._FITS.pop(key)
    with pytest.raises(errors.OutOfResources):
        triton_kernels._first_that_fits(key, (8, 4), run)
