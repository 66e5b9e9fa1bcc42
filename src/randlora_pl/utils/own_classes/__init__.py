"""Classes that a user or an installed package adds to this program."""
