"""Kernels in Triton's language. Importing a module here imports triton, so that only running a kernel does."""
