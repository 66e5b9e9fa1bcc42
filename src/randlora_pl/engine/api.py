"""Runs from Python: ``randlora_pl.fit``."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from randlora_pl.config.classes import normalize
from randlora_pl.config.compose import flatten, nested
from randlora_pl.engine.session import run_fit
from randlora_pl.tasks import AdaptationTask
from randlora_pl.utils.files.run_files import ADAPTER
from randlora_pl.utils.run_results import read_results


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: The run folder: config, log, checkpoints, adapter, ``results.json``.
        results: Metrics and facts by flat names, for example ``test/acc`` (a fraction).
        task: The trained task; its ``model`` is the backbone with the adapter.
        data: Its data module.
    """

    folder: Path
    results: dict[str, Any]
    task: AdaptationTask
    data: LightningDataModule

    @property
    def adapter(self) -> Path:
        """Folder of the adapter that was tested."""
        return self.folder / str(self.results.get("tested", ADAPTER))


def fit(*configs: str | os.PathLike[str] | Mapping[str, Any]) -> RunResult:
    """Train and test, as ``randlora-pl fit`` does.

    Args:
        *configs: Names of bundled configs, files, and mappings of options, nested or with dots
            (``{"data.steps": 100, "model.adapter": "LoRA"}``). Later ones win; options beat files.

    Returns:
        The finished run.

    Raises:
        UserError: An option is wrong, or the data cannot be read.

    Examples:
        >>> import randlora_pl
        >>> run = randlora_pl.fit("quickstart", {"data.steps": 20})
        >>> run.results["test/acc"] > run.results["zeroshot/acc"]
        True
        >>> run.adapter.name
        'adapter'
    """
    words: list[str] = []
    for config in configs:
        if isinstance(config, Mapping):
            for name, value in flatten(normalize(nested(dict(config)))).items():
                words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
        else:
            words += ["--config", os.fspath(config)]
    app = run_fit(words)
    return RunResult(app.folder, read_results(app.folder), app.model, app.datamodule)
