"""Options of a run itself, as ``--run.name``."""

from dataclasses import dataclass
from typing import Annotated, Literal

from randlora_pl.utils.options import Positive

Logger = Literal["tensorboard", "csv", "wandb", "mlflow", "none"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Name, folder, loggers and timeout of a run."""

    name: str | None = None
    """Name of the run (by default dataset, model and adapter), whose folder is ROOT/NAME/TIME."""
    root: str = "runs"
    """Folder of all runs."""
    logger: Logger | list[Logger] = "tensorboard"
    """tensorboard, csv, wandb, mlflow or none, or several as [tensorboard,csv]."""
    timeout: Annotated[float, Positive] = 600.0
    """Seconds to wait for other processes before treating them as lost."""
