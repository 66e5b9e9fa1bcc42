"""A user's own images, in the formats that people keep them in: a reader each, and what readers share."""
