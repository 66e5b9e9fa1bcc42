"""Folder of cached files."""

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """Return the folder of cached files: ``$RANDLORA_PL_CACHE``, or the system's user cache folder."""
    override = os.environ.get("RANDLORA_PL_CACHE")
    return Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("randlora-pl"))
