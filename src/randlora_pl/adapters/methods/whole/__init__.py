"""Methods that train existing tensors instead of an update: full fine-tuning, BitFit, linear probe."""
