"""Measurements that a user can repeat: everything compared is timed in turns, in one run on one machine."""
