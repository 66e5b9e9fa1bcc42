"""Quick commands that list models, datasets, adapters and configs without PyTorch."""
