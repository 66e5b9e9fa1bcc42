"""Helpers that every package uses: errors, files, logs, random numbers, text output."""
