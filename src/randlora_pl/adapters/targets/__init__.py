"""Selection of the weights of a model that receive an update."""
