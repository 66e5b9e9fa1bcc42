"""The suite runs a process for each core, so that each of them has one thread; `-n 0` runs it in one process."""

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported, and for the processes that tests start
os.environ.pop("COLUMNS", None)  # readline sets it in the workers of pytest-xdist, and tables would be cut to it
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks a server starts its own
if shutil.which("nvidia-smi") is None:  # the kernels in Triton run in its interpreter, if that is set before any import
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings

from tests.support.cli import finished, refused, run

__all__ = ["finished", "refused", "run"]

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two threads on two busy cores wait for each other most of the time."""
    import torch

    torch.set_num_threads(1)
