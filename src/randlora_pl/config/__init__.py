"""Configs of a run: composition, validation with near matches, shipped configs; no PyTorch."""
