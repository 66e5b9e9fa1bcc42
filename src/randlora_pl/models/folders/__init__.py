"""Models in a folder or a repository of the Hub: ``local-dir:PATH`` and ``hf-hub:ORG/NAME``."""
