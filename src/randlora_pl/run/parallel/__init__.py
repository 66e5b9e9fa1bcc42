"""Multiprocess training: launch detection, device and strategy options, sharding, and gradient exchange.

Empty on purpose: `launch` is imported before PyTorch.
"""
