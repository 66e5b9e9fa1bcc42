"""Merged models in the format of open_clip, timm or transformers."""
