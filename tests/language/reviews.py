"""Real texts and weights that packages ship, where ``RANDLORA_PL_REAL_TEXTS`` names a folder with both archives.

`scripts/offline_texts.py` has the commands that fetch them.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

VARIABLE = "RANDLORA_PL_REAL_TEXTS"
_FILE = Path(__file__).parents[2] / "scripts" / "offline_texts.py"


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("offline_texts", _FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()


def archives() -> tuple[Path, Path] | None:
    """Snippets and weights, where both are there."""
    found: tuple[Path, Path] | None = SCRIPT.archives(Path(os.environ[VARIABLE])) if VARIABLE in os.environ else None
    return found
