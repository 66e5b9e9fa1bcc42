"""Configs of a run: composition, classes and their options, mistakes with near names, bundled configs."""
