"""Training steps on tensors without data: what they would ask of a GPU, call by call."""
