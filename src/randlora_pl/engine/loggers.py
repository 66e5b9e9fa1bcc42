"""Loggers that ``--run.logger`` names."""

import os
from itertools import count
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from randlora_pl.config.mistakes import check_loggers

PROJECT = "randlora-pl"


def make_loggers(names: str | list[str], folder: Path, root: Path) -> list[Logger]:
    """Return the loggers of a run.

    Args:
        names: Name of a logger, or of several.
        folder: Run folder.
        root: Folder of all runs. MLflow keeps them together, in ``mlflow.db`` there, unless MLFLOW_TRACKING_URI is set.

    Raises:
        UserError: A name is unknown, or its package is not installed.
    """
    check_loggers(names)
    made: list[Logger] = []
    for name in [names] if isinstance(names, str) else names:
        if name == "tensorboard":
            made.append(TensorBoardLogger(folder, name="", version="tensorboard"))
        elif name == "csv":
            made.append(CSVLogger(folder, name="", version=_free(folder, "csv")))
        elif name == "wandb":
            made.append(WandbLogger(save_dir=folder, name=folder.name, project=PROJECT))
        elif name == "mlflow":
            uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
            if not uri:
                uri, artifacts = f"sqlite:///{root.resolve() / 'mlflow.db'}", str(root.resolve() / "mlruns")
            name = f"{folder.parent.name}/{folder.name}"
            made.append(MLFlowLogger(PROJECT, run_name=name, tracking_uri=uri, artifact_location=artifacts))
    return made


def _free(folder: Path, name: str) -> str:
    """Return an unused folder name: the CSV logger would empty the folder of the run to resume."""
    names = (name if number == 1 else f"{name}_{number}" for number in count(1))
    return next(free for free in names if not (folder / free).exists())
