"""Kernels in Triton for CUDA as operators of PyTorch; `launch` selects them. Without triton, nothing here runs."""
