"""Inspect, convert and share adapters.

ADAPTER is a folder, one .safetensors file, or a run (RUN, or runs/NAME for its newest run), whose tested adapter is
used.
"""
