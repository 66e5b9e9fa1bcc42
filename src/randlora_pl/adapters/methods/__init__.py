"""Methods, one file each, in folders by the rank of their update."""
