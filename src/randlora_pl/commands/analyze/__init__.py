"""Analyze adapters beyond their accuracy: tables, CSV and plots in a new folder.

RUN is a run folder, runs/NAME for its newest run, or an adapter.
"""
