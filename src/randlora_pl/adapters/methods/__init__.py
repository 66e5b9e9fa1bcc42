"""The methods, one file each, by the rank of their update."""
