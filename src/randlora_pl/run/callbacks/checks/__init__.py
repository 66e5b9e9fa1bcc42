"""Checks that stop a run or warn: its gradients, and the lock of its folder."""
