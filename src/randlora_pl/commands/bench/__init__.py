"""`bench`: speed and memory of input pipeline, training steps and sweeps."""
