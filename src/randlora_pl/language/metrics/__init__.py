"""Metrics of generated and labelled texts."""
