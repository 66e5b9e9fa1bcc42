"""Methods whose update has a chosen rank."""
