"""Runs from Python: ``randlora_pl.fit``."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from randlora_pl.adapters import Adapter
from randlora_pl.adapters.save_load import check_loads_again
from randlora_pl.data.base import PlannedData
from randlora_pl.run.options.compose import flatten, nested, normalize
from randlora_pl.run.options.saved_config import plain
from randlora_pl.run.session import run_fit
from randlora_pl.tasks import Objective
from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.run_files import ADAPTER, read_results


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
    task: Objective
    data: PlannedData

    @property
    def adapter(self) -> Path:
        """Folder of the adapter that was tested."""
        return self.folder / str(self.results.get("tested", ADAPTER))


def fit(*configs: str | os.PathLike[str] | Mapping[str, Any], adapter: Adapter | None = None) -> RunResult:
    """Train and test, like ``randlora-pl fit``.

    Args:
        *configs: Names of bundled configs, files, and mappings of options, nested or with dots
            (``{"data.steps": 100, "model.adapter": "LoRA"}``). Later ones take precedence, and options over files.
        adapter: Method to train, with its options; it overrides a method in the configs.

    Returns:
        The finished run.

    Raises:
        UserError: An option is wrong, the data cannot be read, or a file of the adapter could not be loaded again.

    Examples:
        >>> import randlora_pl
        >>> from randlora_pl.adapters import RandLoRA
        >>> run = randlora_pl.fit("quickstart", {"data.steps": 20}, adapter=RandLoRA(rank=6))
        >>> run.results["test/acc"] > run.results["zeroshot/acc"]
        True
        >>> run.adapter.name
        'adapter'
    """
    words: list[str] = []
    for config in configs:
        if isinstance(config, Mapping):
            for name, value in flatten(normalize(nested(dict(config)))).items():
                if adapter is None or not f"{name}.".startswith("model.adapter."):
                    words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
        else:
            words += ["--config", os.fspath(config)]
    if adapter is not None:
        if not isinstance(adapter, Adapter):
            raise UserError(f"adapter is {brief(adapter)}: give a method such as RandLoRA(rank=6).")
        check_loads_again(adapter)
        words += ["--model.adapter", json.dumps(plain(adapter))]
    app = run_fit(words)
    return RunResult(app.folder, read_results(app.folder), app.task, app.datamodule)
