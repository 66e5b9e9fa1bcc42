"""Configs of a run: composition, validation with near matches, bundled configs; no PyTorch."""
