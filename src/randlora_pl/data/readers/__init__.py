"""Dataset readers: one module per way in which a dataset labels its images."""
