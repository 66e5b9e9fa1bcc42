"""The command line: quick verbs on the standard library, one thin LightningCLI for the rest."""
