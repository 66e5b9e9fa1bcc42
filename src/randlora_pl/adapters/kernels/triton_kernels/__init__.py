"""Kernels in Triton for CUDA as operators of PyTorch: `choice` selects them, `costs` counts what they do."""
