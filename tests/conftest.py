"""The suite runs a process for each core, so that each of them has one thread; `-n 0` runs it in one process."""

import gc
import os
import shutil
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported, and for the processes that tests start
os.environ.pop("COLUMNS", None)  # readline sets it in the workers of pytest-xdist, and tables would be cut to it
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks a server starts its own
if shutil.which("nvidia-smi") is None:  # the kernels in Triton run in its interpreter, if that is set before any import
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings

from tests.support.cli import drawn, finished, refused, run
from tests.support.own import own

__all__ = ["drawn", "finished", "own", "refused", "run"]

settings.register_profile("default", deadline=None, max_examples=25)  # a busy machine is no failure
settings.register_profile("full", deadline=None)


def pytest_configure(config: pytest.Config) -> None:
    default = config.getoption("markexpr") in config.getini("addopts")
    settings.load_profile("default" if default else "full")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """Import what the tests need without garbage collections, and look at it in no later one: it all stays."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else Triton reports leaks


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two threads on two busy cores wait for each other most of the time."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread_again() -> Iterator[None]:
    """A test that sets another number leaves it to no other: sums of two threads differ in their last bits."""
    import torch

    yield
    torch.set_num_threads(1)
