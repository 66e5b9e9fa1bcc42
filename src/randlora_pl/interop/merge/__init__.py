"""Merged models in the formats of open_clip, timm and transformers."""
