"""Helpers without a subject of their own: errors, files, logs, random numbers, text for people."""
