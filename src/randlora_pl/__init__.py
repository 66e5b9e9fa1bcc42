"""randlora-pl: full-rank parameter-efficient fine-tuning as a PyTorch Lightning application."""

__version__ = "0.1.0"
