"""Fast products of adapted layers, each tested against the plain equation."""
