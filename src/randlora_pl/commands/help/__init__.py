"""Help pages; nothing here imports the command that it describes."""
