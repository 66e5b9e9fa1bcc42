"""The suite runs a process for each core, so that each of them has one thread; `-n 0` runs it in one process."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported, and for the processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks a server starts its own
