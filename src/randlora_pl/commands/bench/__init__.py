"""Measure the speed of this machine. Everything compared is timed in turns, in one run."""
