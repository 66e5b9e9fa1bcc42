"""Conversion of a sweep's folder to a report: tables, plots, Markdown, CSV and one HTML page.

Everything is read from files and nothing is filled in. `collect` reads, `cells` takes means, the modules of tables and
plots make a `document`, `files` writes all of it.
"""
