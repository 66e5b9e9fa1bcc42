"""One run, callable without the command line: Lightning CLI, stages, run folder, errors, summary."""
