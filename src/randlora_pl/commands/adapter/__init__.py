"""`adapter`: inspect, compare, merge, export and import adapter files."""
