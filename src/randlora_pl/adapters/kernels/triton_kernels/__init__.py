"""Kernels in Triton for CUDA as operators of PyTorch; `choice` selects them. Without triton, nothing here runs."""
