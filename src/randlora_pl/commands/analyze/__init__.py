"""Analyze adapters beyond their accuracy: tables, CSV and plots in a new folder.

RUN is a run folder, runs/NAME for its newest run, or an adapter.
"""

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from randlora_pl.commands import common
from randlora_pl.run.options.adapter_config import config_beside, data_beside
from randlora_pl.run.run_folder import check_new, new_folder, output_folder
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Count, Device, NotNegative, Option, Root
from randlora_pl.utils.run_files import ADAPTER, find_adapter
from randlora_pl.utils.text import byte_size

if TYPE_CHECKING:
    import torch

    from randlora_pl.adapters import AdapterFile
    from randlora_pl.data import ImageData
    from randlora_pl.tasks import ImageTask
    from randlora_pl.utils.image_spec import ImageSpec

_DATA = (
    *("dataset", "root", "split", "classes", "shots", "fraction", "train_split"),
    *("templates", "classnames", "on_error", "max_pixels"),
)
"""Data options of a run that select images and classes; options of the training loop do not matter."""

NewFolder = Annotated[str | None, Option("DIR", "New folder (default: runs/analyze/COMMAND/TIME)", check_new)]


@dataclass(frozen=True)
class Images:
    """Test images that models are compared on.

    Attributes:
        images: Test images per dataset. 0 uses all.
        seed: Seed that selects the images.
        batch_size: Images per batch.
        root: Folder with the data (default: the user's data folder).
        device: Device of the models.
    """

    images: Annotated[int, NotNegative] = 0
    seed: int = 0
    batch_size: Count = 256
    root: Root = None
    device: Device = "auto"


@dataclass(frozen=True)
class AnalyzedRun:
    """Run, or adapter without a run.

    Attributes:
        path: The typed path.
        file: The adapter.
        data: Options of `ImageData` that give its training data; empty if unknown.
    """

    path: Path
    file: "AdapterFile"
    data: dict[str, Any]

    @property
    def dataset(self) -> str:
        """Name of the dataset that it was trained on; an adapter without one is refused."""
        if "dataset" not in self.data:
            raise UserError(f"{self.path} does not name its training data; pass --dataset NAME")
        return str(self.data["dataset"])


def open_run(path: Path) -> AnalyzedRun:
    """Read the adapter of a run folder, or an adapter folder or file, and the options of its training data."""
    from randlora_pl.adapters import read_adapter

    adapter = find_adapter(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; a run folder is ROOT/NAME/TIME, an adapter RUN/{ADAPTER}.")
    file = read_adapter(adapter)
    folder = adapter.resolve().parent
    if beside := config_beside(adapter):
        config = data_beside(beside)
        known = config.get("data", {}) | {"seed": config.get("seed_everything", 0)}
    else:
        known = dict(file.metadata.get("training", {}))
        known |= {"classes": known.get("class_half")}
    data = {name: known[name] for name in (*_DATA, "seed") if known.get(name) is not None}
    if (folder / "shots.json").is_file() and {"shots", "fraction"} & data.keys():
        data["shots_file"] = str(folder / "shots.json")
    return AnalyzedRun(path, file, data if "dataset" in data else {})


def labels_of(runs: Sequence[AnalyzedRun]) -> list[str]:
    """Return method and rank of each run; if these are the same for two, with the typed path."""
    from randlora_pl.run.callbacks.summary import describe

    plain = [describe(run.file.adapter) for run in runs]
    return [
        f"{label} ({run.path})" if plain.count(label) > 1 else label for label, run in zip(plain, runs, strict=True)
    ]


def parameters(run: AnalyzedRun) -> int:
    """Return the number of trainable parameters of an adapter, without a head."""
    return sum(tensor.numel() for tensor in run.file.tensors.values())


def task_of(run: AnalyzedRun, device: "torch.device") -> "ImageTask":
    """Return the task of a run, merged, in eval mode."""
    from randlora_pl.tasks import load_task

    task = load_task(run.file.path)
    task.to(device)
    task.prepare_evaluation()
    return task


def data_of(
    run: AnalyzedRun, spec: "ImageSpec", dataset: str | None = None, root: str | None = None, batch: int = 256
) -> "ImageData":
    """Return the training data of a run, or other data, with its model's preprocessing; not set up yet.

    Raises:
        UserError: The dataset is not known, or its name is unknown.
    """
    from randlora_pl.data.unlabelled import frame_of, framed

    options = dict(run.data) if dataset in (None, run.data.get("dataset")) else {"dataset": dataset}
    options |= {"dataset": dataset or run.dataset} | ({} if root is None else {"root": root})
    return framed(options, frame_of(run.file.metadata, spec), batch)


def advised(batch: int) -> AbstractContextManager[None]:
    """Raise an error with advice if memory runs out for ``batch`` images at a time, or an image cannot be read."""
    return common.advised(f"--batch-size {max(1, batch // 2)}", "Replace it, or use another dataset.")


def new_output(output: str | None, verb: str) -> Path:
    """Return a new folder: the typed one, or ``runs/analyze/VERB/TIME``."""
    return new_folder(Path("runs") / "analyze", verb, "--output") if output is None else output_folder(output, verb)


def write_output(output: str | None, verb: str, rows: list[dict[str, Any]], content: Any, figure: Any) -> Path:
    """Write a table, JSON and a plot to a new folder as by `new_output`; remove it if not all could be written."""
    from randlora_pl.lab.analysis.figures import write_figure
    from randlora_pl.lab.bench.report import write_csv, write_json

    folder = new_output(output, verb)
    try:
        write_csv(rows, folder / f"{verb}.csv")
        write_json(content, folder / f"{verb}.json")
        write_figure(figure, folder, verb)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def print_output(folder: Path) -> None:
    """Print the folder that was written, with its files."""
    sizes = []
    for file in sorted(folder.iterdir()):
        with suppress(OSError):
            sizes.append(f"{file.name} ({byte_size(file.stat().st_size)})")
    print(f"\nWritten: {folder}/: {', '.join(sizes)}")
