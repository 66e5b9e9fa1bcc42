"""Text output: terminal, logs, CSV, sizes and durations."""
