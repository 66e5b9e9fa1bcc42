"""The paper's own numbers, as data with their source. See ``README.md`` beside this file."""

from randlora_pl.lab.paper.paper import SOURCE, Note, PaperCell, cells, column_of, datasets, notes, numbers, table

__all__ = ["SOURCE", "Note", "PaperCell", "cells", "column_of", "datasets", "notes", "numbers", "table"]
