"""Helpers that every package uses: errors, files, logs, random numbers, text output."""

__version__ = "0.1.0"
