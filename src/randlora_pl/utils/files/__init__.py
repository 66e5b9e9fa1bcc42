"""File helpers: atomic output, parsing within limits, the cache folder, files of a run."""
