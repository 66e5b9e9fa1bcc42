"""Conversion of a sweep's folder to a report: tables, plots, Markdown, CSV and one HTML page.

Everything is read from files and nothing is filled in. `collect` reads, `results` takes means, the modules of tables
and plots make a `document`, `markdown` and `html` print it, `files` writes all of it.
"""
