"""Analyze adapters beyond their accuracy: tables, CSV and plots in a new folder.

RUN is a run folder, runs/NAME for its newest run, or an adapter.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from randlora_pl import adapters, tasks
from randlora_pl.commands import common
from randlora_pl.lab import analysis
from randlora_pl.run.options.saved_config import config_beside, data_beside
from randlora_pl.run.run_folder import check_new, new_folder, output_folder
from randlora_pl.utils.errors import UserError, errors_in
from randlora_pl.utils.options import Count, Device, NotNegative, Option, Root, Run, Runs
from randlora_pl.utils.run_files import ADAPTER, find_adapter, find_run
from randlora_pl.utils.text import byte_size, table

if TYPE_CHECKING:
    import torch

    from randlora_pl.data import ImageData
    from randlora_pl.lab.analysis.weights import LayerFit
    from randlora_pl.utils.image_spec import ImageSpec

    Updates = dict[str, torch.Tensor]

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
    file: "adapters.AdapterFile"
    data: dict[str, Any]

    @property
    def dataset(self) -> str:
        """Name of the dataset that it was trained on; an error without one."""
        if "dataset" not in self.data:
            raise UserError(f"{self.path} does not name its training data; pass --dataset NAME")
        return str(self.data["dataset"])


def open_run(path: Path) -> AnalyzedRun:
    """Read the adapter of a run folder, or an adapter folder or file, and the options of its training data."""
    adapter = find_adapter(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; a run folder is ROOT/NAME/TIME, an adapter RUN/{ADAPTER}.")
    file = adapters.read_adapter(adapter)
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


def task_of(run: AnalyzedRun, device: "torch.device") -> "tasks.ImageTask":
    """Return the task of a run, merged, in eval mode."""
    task = tasks.load_task(run.file.path)
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


def represent(
    path: Run,
    *,
    ranks: Sequence[Annotated[Count, Option("K")]] = (),
    targets: Sequence[str] = (),
    sweeps: Count = 100,
    seed: int = 0,
    lead: Sequence[str] = (),
    output: NewFolder = None,
) -> int:
    """Measure how well LoRA and RandLoRA with equally many parameters can express a real update (equations 6 to 8).

    Examples:
        randlora-pl analyze represent runs/full
        randlora-pl analyze represent runs/full --ranks 32 --targets mlp
        randlora-pl analyze represent runs/full --lead weights runs/other-seed

    Args:
        path: Run or adapter whose update is approximated, of full fine-tuning (with LoRA or RandLoRA inside, the
            comparison is circular)
        ranks: Ranks of LoRA. RandLoRA gets the rank with the nearest number of parameters (default: 1 2 4 8 16 32, at
            most a quarter of the smallest layer)
        targets: Layers of full fine-tuning, as in --model.targets (default: the layers that adapters attach to)
        sweeps: Maximum number of rounds of the fit, which stops at convergence. 10 come close. A ViT-B layer takes
            about a minute at rank 32 on one core
        seed: Seed of RandLoRA's bases
        lead: Source of the top left singular vectors that lead bases: `weights` for the pretrained weights, or a run
            of the same model for its update. The run needs another seed: the same batches make errors look too small.
            A run of one step of SGD gives the gradient

    Note:
        LoRA's error is the error of the truncated singular value decomposition, the optimum: (sum_{i>k}
        sigma_i^2)^(1/2). The paper's equation 8 omits the square root, without which it is not a Frobenius norm.
        RandLoRA's lambda and gamma are fitted by alternating least squares, which finds a local optimum. The file
        represent.csv has per layer the relative errors, both numbers of parameters, and the bound n epsilon of equation
        7. For orthonormal bases and an A of signs, the optimum has a closed form. They are random, or the first column
        of each block is a direction that leads. A small error does not imply a low loss or a high accuracy:
        docs/better_bases.md.
    """
    run = open_run(path)
    updates = _updates(run, targets)
    smallest = min(min(update.shape) for update in updates.values())
    ranks = sorted(set(ranks or [rank for rank in (1, 2, 4, 8, 16, 32) if rank <= max(1, smallest // 4)]))
    if ranks[-1] > smallest:
        raise UserError(f"--ranks: {ranks[-1]} is larger than the smallest side of a layer, {smallest}.")
    leads = _leads(run, updates, lead)
    import torch

    from randlora_pl.adapters.random_bases import WeightShape
    from randlora_pl.lab.analysis import weights

    shapes = [WeightShape(layer, *update.shape) for layer, update in updates.items()]
    fits: dict[int, list[LayerFit]] = {rank: [] for rank in ranks}
    pairs = {rank: weights.methods_of(rank, shapes, seed) for rank in ranks}
    bases = {rank: adapter.bases(shapes, torch.device("cpu")) for rank, (_, adapter) in pairs.items()}
    with common.counting("fits", len(ranks) * len(updates)) as tick:
        for layer, update in updates.items():
            led: dict[str, torch.Tensor | None] = {"orthonormal": None}
            led |= {f"led by {name}": weights.directions(matrices[layer]) for name, matrices in leads.items()}
            for rank in ranks:
                fits[rank].append(weights.represent(layer, update, *pairs[rank], bases[rank], sweeps, led))
                tick(1)
    notes = {rank: adapter.rank for rank, (_, adapter) in pairs.items()}
    rows = [
        {"lora_rank": rank, "randlora_rank": notes[rank]} | one.as_row() for rank, each in fits.items() for one in each
    ]
    (method,) = labels_of([run])
    content = {"run": str(run.path), "method": method, "seed": seed, "leads": list(lead), "rows": rows}
    content |= {"note": note_of(run.file.adapter)}
    figure = weights.represent_figure(fits, f"Remaining error of the update of {method}")
    folder = write_output(output, "represent", rows, content, figure)
    _print(fits, notes, f"{method}, {run.path}")
    if content["note"]:
        print(f"\n{content['note']}")
    print_output(folder)
    return 0


def note_of(adapter: "adapters.Adapter") -> str:
    """Return a note on an update that has the form of one of the two fits already, or ""."""
    from randlora_pl.lab.analysis.weights import NAMES

    own = sorted({leaf.method() for leaf in adapter.leaves()} & {*NAMES})
    if not own:
        return ""
    return f"Note: this update is {' and '.join(own)}'s own, so the comparison is circular. Use a full fine-tuning."


def _updates(run: AnalyzedRun, targets: Sequence[str]) -> "Updates":
    """Return the nonzero updates to express."""
    from randlora_pl.adapters.select import select
    from randlora_pl.interop.base_model import load_base

    updates = analysis.matrix_updates(run.file)
    if run.file.adapter.trains_base:
        sites = select(load_base(run.file).submodule_for(run.file), list(targets) or None, False)
        wanted = [site.shape.layer for site in sites]
        updates = {layer: updates[layer] for layer in wanted if layer in updates}
    elif targets:
        raise UserError(f"--targets choose layers of full fine-tuning; {run.path} is {run.file.adapter.method()}.")
    _check_finite(run, updates)
    updates = {layer: update for layer, update in updates.items() if update.any()}
    if not updates:
        raise UserError(f"{run.path} ({run.file.adapter.method()}) changes no matrix of these layers.")
    return updates


def _check_finite(run: AnalyzedRun, updates: "Updates") -> None:
    for layer, update in updates.items():
        if not update.isfinite().all():
            raise UserError(
                f"{run.path}: the update of {layer} is not finite (NaN or infinity), because training diverged."
            )


def _leads(run: AnalyzedRun, updates: "Updates", names: Sequence[str]) -> "dict[str, Updates]":
    """Return the matrices whose left singular vectors lead, by name and layer."""
    from randlora_pl.interop.base_model import load_base, same_base, site_weights

    matrices = {}
    for name in names:
        if name == "weights":
            matrices[name] = site_weights(load_base(run.file).submodule_for(run.file), updates)
            continue
        lead = open_run(find_run(name))
        same_base([run.file, lead.file])
        mine = matrices[name] = analysis.matrix_updates(lead.file)
        for layer in updates:
            if layer not in mine or not mine[layer].any():
                raise UserError(f"--lead {name}: {lead.path} does not change {layer}. Give a run that does.")
        _check_finite(lead, mine)
        known = [(each.data.get("dataset"), each.data.get("seed")) for each in (run, lead)]
        if (known[0] == known[1] and None not in known[0]) or all(updates[one].equal(mine[one]) for one in updates):
            raise UserError(
                f"--lead {name}: {lead.path} was trained on the same batches as {run.path}, so errors look too small. "
                "Train it with another --seed_everything."
            )
    return matrices


def _print(fits: dict[int, "list[LayerFit]"], chosen: Mapping[int, int | dict[str, int]], what: str) -> None:
    from randlora_pl.lab.analysis.weights import NAMES, mean_error

    rows = []
    for rank, each in fits.items():
        counts = [sum(getattr(one, f"{name}_parameters") for one in each) for name in ("lora", "randlora")]
        errors = [mean_error(each, name) for name in ("lora", "randlora")]
        better = sum(one.randlora < one.lora for one in each)
        cells = [f"LoRA {rank}", f"{counts[0]:,}", f"{errors[0]:.4f}", f"RandLoRA {chosen[rank]}", f"{counts[1]:,}"]
        rows.append([*cells, f"{errors[1]:.4f}", f"{better} of {len(each)}", f"{max(one.bound for one in each):.1f}"])
    print(f"Remaining error of the update of {what}, relative to its norm:\n")
    header = ("", "parameters", "error", "", "parameters", "error", "RandLoRA closer", "bound of equation 7, at most")
    print(table(header, rows))
    print("\nErrors: root mean square over layers. LoRA's are optimal, RandLoRA's are from a local optimum.")
    names = list(fits[min(fits)][0].errors)
    shares = [
        [f"LoRA {rank}", *(f"{1 - mean_error(each, name) ** 2:.4f}" for name in names)] for rank, each in fits.items()
    ]
    print("\nCaptured share of the update, also by RandLoRA with orthonormal bases and an A of signs:\n")
    print(table(("budget", *NAMES, *names[2:]), shares))
    print("\nShares: 1 - error^2. They hold for this one update, and predict neither loss nor accuracy.")


def spectrum(runs: Runs, *, output: NewFolder = None) -> int:
    """Compare rank, stable rank, effective rank and singular values of the update of every layer.

    Table 2 of the paper finds that, at equal parameters, accuracy increases with the rank of the updates.

    Examples:
        randlora-pl analyze spectrum runs/lora runs/randlora
        randlora-pl analyze spectrum ADAPTER ADAPTER --output DIR

    Args:
        runs: Run folders or adapters, also of full fine-tuning: its update is trained minus pretrained weights

    Note:
        spectrum.csv has a row per adapter and layer. spectrum.json adds the singular values, spectrum.png and .svg plot
        them. The rank counts singular values above max(out, in) * 1.2e-7 of the largest. Smaller values are rounding
        errors. Stable rank: sum of squares / largest square. Effective rank: exp of the entropy of the singular values
        over their sum. During training: fit --spectrum.every_n_steps N
    """
    opened = [open_run(path) for path in runs]
    spectra = {}
    for label, run in zip(labels_of(opened), opened, strict=True):
        updates = analysis.matrix_updates(run.file)
        if not updates:
            raise UserError(f"{run.path} changes no matrix of a layer ({label}), so it has no spectrum.")
        with errors_in(run.path):
            spectra[label] = [analysis.layer_spectrum(layer, update) for layer, update in updates.items()]
    shared = analysis.common_layers(list(spectra.values()))
    rows, cells, content = [], [], []
    for (label, layers), run in zip(spectra.items(), opened, strict=True):
        rows += [{"adapter": label} | one.as_row() for one in layers]
        mean = analysis.means([one for one in layers if one.layer in shared])
        facts = {"adapter": label, "path": str(run.path), "parameters": parameters(run), "mean": mean}
        content.append(facts | {"layers": [o.as_row() | {"singular_values": o.values.tolist()} for o in layers]})
        count = sum(one.layer in shared for one in layers)
        ranks = [f"{mean[key]:.1f}" for key in ("rank", "full_rank", "stable_rank", "effective_rank")]
        cells.append([label, f"{parameters(run):,}", f"{count} of {len(layers)}", *ranks, f"{mean['norm']:.3f}"])
    folder = write_output(output, "spectrum", rows, content, analysis.spectrum_figure(spectra))
    header = ("adapter", "parameters", "layers", "rank", "of", "stable rank", "effective rank", "norm")
    print(f"Means over the {len(shared)} layers that all of them change:\n")
    print(table(header, cells))
    print_output(folder)
    return 0
