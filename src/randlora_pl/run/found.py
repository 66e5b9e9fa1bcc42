"""The adapter that a search found (`AutoLoRA`), as a config for the training after it."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from randlora_pl.utils.files.atomic_output import write_text
from randlora_pl.utils.files.run_files import CONFIG

FRAGMENT = "ranks.yaml"


def write_found(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the adapter of the facts of a search as a config fragment into its run folder; nothing without one."""
    if (adapter := facts.get("search/adapter")) is None:
        return
    options = {"adapter": adapter, "learning_rate": None}  # the default of this method, not the search's
    text = yaml.safe_dump({"model": {"init_args": options}}, sort_keys=False, width=120)
    head = "# Found by a search on a part of the training samples; train it on all of them with:\n#\n"
    write_text(folder / FRAGMENT, f"{head}#   {training_of(folder)}\n{text}")


def training_of(folder: Path) -> str:
    """Return the command that trains what a run found."""
    path = shlex.quote(str(folder))
    return f"randlora-pl fit --config {path}/{CONFIG} --config {path}/{FRAGMENT}"
