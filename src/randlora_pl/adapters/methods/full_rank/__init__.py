"""Methods with a full-rank update and few trainable parameters."""
