"""Text for people: the terminal, tables, sizes and durations."""
