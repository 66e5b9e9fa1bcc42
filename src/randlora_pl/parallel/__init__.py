"""Several processes: how they were started, what they agree on, and what they exchange while they train.

Empty on purpose: `launch` is read before PyTorch is imported.
"""
