"""The command line: quick commands on the standard library, commands that import PyTorch, and one thin LightningCLI."""
