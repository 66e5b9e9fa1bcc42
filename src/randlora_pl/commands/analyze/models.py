"""``analyze cka``, ``landscape`` and ``forgetting``: activations of whole models, their losses and what they forgot."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from randlora_pl.commands import analyze
from randlora_pl.commands.common import counting, pick_device
from randlora_pl.commands.data import present_root
from randlora_pl.data.catalog import find
from randlora_pl.lab import analysis
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import parse_json
from randlora_pl.utils.options import Check, Count, Device, Folder, Root, Runs, at_least, between
from randlora_pl.utils.text import duration, table
from randlora_pl.utils.weights_files import local_name

if TYPE_CHECKING:
    import torch

    from randlora_pl.data import ImageData
    from randlora_pl.lab.analysis.forgetting import Forgetting
    from randlora_pl.lab.analysis.models import Layer
    from randlora_pl.utils.image_spec import ImageSpec


def cka(
    runs: Runs,
    *,
    dataset: str | None = None,
    tested: analyze.Images = analyze.Images(images=1024),
    output: analyze.NewFolder = None,
) -> int:
    """Compare the activations of two models: linear CKA of attention and MLP outputs in every block (Figure 4a).

    1 means equal except for rotation and scale, 0 nothing in common.

    Examples:
        randlora-pl analyze cka runs/full runs/lora runs/randlora
        randlora-pl analyze cka FULL_A LORA_A FULL_B LORA_B           two datasets: means over both

    Args:
        runs: Runs or adapters. The first run of each dataset is the reference for the others. Methods of the same name
            and rank are averaged over the datasets
        batch_size: Images per minibatch, at least 4
        dataset: Use images of this dataset for all runs

    Note:
        cka.csv has a row per run, block and kind. cka.png and .svg show the means. The estimate is unbiased over
        minibatches (HSIC_1 of Song et al., 2012; Nguyen et al., 2021). The activations of an image cover all of its
        tokens. The paper states neither its activations nor its number of images.
    """
    if len(runs) < 2:
        raise UserError("analyze cka: give two or more runs, the reference first.")
    if 0 < tested.images < 4:
        raise UserError(f"--images is {tested.images}: give at least 4, or 0 for all.")
    if tested.batch_size < 4:
        raise UserError(f"--batch-size is {tested.batch_size}: the unbiased estimate needs at least 4 images.")
    device = pick_device(tested.device)
    opened = [analyze.open_run(path) for path in runs]
    groups: dict[str, list[analyze.AnalyzedRun]] = {}
    for run in opened:
        groups.setdefault(dataset or run.dataset, []).append(run)
    labels: dict[Path, str] = {}  # unique among the runs of one dataset, and equal for the same method on others
    for name, members in groups.items():
        labels |= dict(zip((run.path for run in members), analyze.labels_of(members), strict=True))
        if len(members) < 2:
            raise UserError(f"{members[0].path} is the only run on {name}: CKA compares two runs on one dataset.")
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[dict[Layer, float]]] = {}
    counts = []
    for name, members in groups.items():
        with analyze.advised(tested.batch_size):
            count, similarities = _compare(members, dataset, tested, device)
        counts.append(f"{count:,} test images of {name}")
        for run in members[1:]:
            values = similarities[str(run.path)]
            curves.setdefault(labels[run.path], []).append(values)
            fixed = {"data_set": name, "reference": str(members[0].path), "run": str(run.path)}
            fixed |= {"method": labels[run.path]}
            rows += [fixed | {"block": block + 1, "kind": kind, "cka": v} for (block, kind), v in values.items()]
    mean = {}
    for label, each in curves.items():
        if any(one.keys() != each[0].keys() for one in each):
            raise UserError(f"{label}: its runs have models of different depth, so their layers cannot be averaged.")
        mean[label] = {layer: sum(one[layer] for one in each) / len(each) for layer in each[0]}
    reference = " / ".join(dict.fromkeys(labels[members[0].path] for members in groups.values()))
    content = {"images": counts, "seed": tested.seed, "batch_size": tested.batch_size, "rows": rows}
    figure = analysis.cka_figure(mean, reference, "; ".join(counts))
    folder = analyze.write_output(output, "cka", rows, content, figure)
    print(f"CKA with {reference} on {'; '.join(counts)}:\n")
    columns = [(label, kind) for label in mean for kind in ("attention", "mlp")]
    cells = []
    for block in sorted({block for values in mean.values() for block, _ in values}):
        shown = (mean[label].get((block, kind)) for label, kind in columns)
        cells.append([block + 1, *("" if value is None else f"{value:.4f}" for value in shown)])
    print(table(["block", *(f"{label}, {kind}" for label, kind in columns)], cells))
    analyze.print_output(folder)
    return 0


def _compare(
    runs: list[analyze.AnalyzedRun], dataset: str | None, tested: analyze.Images, device: "torch.device"
) -> tuple[int, dict[str, Any]]:
    """Return the CKA of runs of one dataset with the first: number of images, and values by layer for each path."""
    first, *others = runs
    from randlora_pl.data.unlabelled import random_samples

    reference = analyze.task_of(first, device)
    data = analyze.data_of(first, reference.image_spec, dataset, tested.root, tested.batch_size)
    data.prepare_data()
    data.setup("test")
    samples = random_samples(data.samples("test"), tested.images or None, tested.seed)
    tasks = {str(run.path): analyze.task_of(run, device) for run in others}
    for name, task in tasks.items():
        if task.image_spec != reference.image_spec:
            raise UserError(f"{name} uses different image settings than {first.path}: they cannot be compared.")
    with counting("images", len(samples), data.row.name) as tick:

        def images() -> "Iterator[torch.Tensor]":
            for batch, _ in analysis.batches(data, samples, tested.batch_size, device):
                yield batch
                tick(len(batch))

        models = {name: task.model for name, task in tasks.items()}
        return len(samples), analysis.compare(reference.model, models, images())


def forgetting(
    runs: Runs, *, datasets: Sequence[str], tested: analyze.Images = analyze.Images(), output: analyze.NewFolder = None
) -> int:
    """Measure what a tuned CLIP has forgotten: its zero-shot accuracy on other datasets, before and after tuning.

    Examples:
        randlora-pl analyze forgetting runs/lora runs/randlora --datasets fashion_mnist cifar10

    Args:
        runs: Runs or adapters of VisionLanguageTask, TextHeadTask or PromptTask, which can predict new classes
        datasets: Datasets (randlora-pl datasets). The training dataset can be one of them

    Note:
        The prompts are the run's: its caption, or the average over each dataset's templates. "before" is the base model
        with the same prompts. The mean leaves out the training dataset. forgetting.csv has a row per run and dataset.
    """
    datasets = list(dict.fromkeys(datasets))
    rows_of_data = [find(name) for name in datasets]
    if with_captions := [row.name for row in rows_of_data if row.captions]:
        raise UserError(f"{with_captions[0]}: captions are not classes; name datasets with classes.")
    present_root(tested.root, rows_of_data, "analyze forgetting RUN --datasets")
    device = pick_device(tested.device)
    from randlora_pl.lab.analysis.forgetting import check_task
    from randlora_pl.lab.bench.report import write_csv, write_json

    opened = [analyze.open_run(path) for path in runs]
    for run in opened:
        check_task(run.file)
    rows: list[dict[str, Any]] = []
    cells: list[list[str]] = []
    folder: Path | None = None
    tests = _tested(opened, datasets, tested, device)
    for label, run in zip(analyze.labels_of(opened), opened, strict=True):
        with analyze.advised(tested.batch_size):
            results = next(tests)
        about = {"run": str(run.path), "method": label, "parameters": analyze.parameters(run)}
        about["trained_on"] = run.data.get("dataset")
        rows += [about | vars(one) | {"change": one.change} for one in results]
        folder = folder or analyze.new_output(output, "forgetting")  # every finished run is kept
        write_csv(rows, folder / "forgetting.csv")
        write_json(rows, folder / "forgetting.json")
        elsewhere = [one.change for one in results if one.dataset != run.data.get("dataset")]
        mean = f"{sum(elsewhere) / len(elsewhere):+.2f}" if elsewhere else ""
        changes = (f"{one.before:.2f}, {one.after:.2f} ({one.change:+.2f})" for one in results)
        cells.append([label, *changes, mean])
    assert folder is not None
    header = ["method", *(f"{name}: before, after" for name in datasets), "mean change elsewhere"]
    print("Zero-shot accuracy in percent of the test images, points in brackets:\n")
    print(table(header, cells))
    analyze.print_output(folder)
    return 0


def _tested(
    runs: list[analyze.AnalyzedRun], datasets: Sequence[str], tested: analyze.Images, device: "torch.device"
) -> "Iterator[list[Forgetting]]":
    """Yield the results of each run, one per dataset; a base model is tested once for the same prompts."""
    from randlora_pl.adapters import merge
    from randlora_pl.data.unlabelled import frame_of, framed, random_samples
    from randlora_pl.interop.base_model import adapted, base_name, load_base
    from randlora_pl.lab.analysis.forgetting import Forgetting, prompts_of
    from randlora_pl.lab.analysis.models import refuse_several
    from randlora_pl.models import clip_image_spec, encode_prompts, load_tokenizer
    from randlora_pl.models.text import zero_shot_accuracy
    from randlora_pl.tasks import load_task
    from randlora_pl.tasks.images import ClipTask

    known: dict[Any, tuple[float, int]] = {}
    sets: dict[tuple[str, ImageSpec], ImageData] = {}
    for run in runs:
        base = load_base(run.file)
        prompted = load_task(run.file.path).to(device) if "prompts" in run.file.metadata["arguments"] else None
        assert prompted is None or isinstance(prompted, ClipTask)
        tuned = adapted(base, run.file).model if prompted is None else prompted.model
        merge(tuned, strict=False)
        base.model.to(device)
        tuned.to(device)
        about = run.file.config["base_model"]
        model_name = local_name(about, run.path)
        tag = "random" if about.get("sha256") else about["pretrained"]  # the path of a file adds nothing
        spec = frame_of(run.file.metadata, clip_image_spec(model_name, tag, about.get("image_size")))
        tokenizer = load_tokenizer(model_name)
        for dataset in datasets:  # all of them before the first is tested
            if (dataset, spec) not in sets:
                sets[dataset, spec] = framed({"dataset": dataset, "root": tested.root}, spec, tested.batch_size)
                refuse_several(sets[dataset, spec], "--datasets")
                sets[dataset, spec].setup("test")
        results = []
        for dataset in datasets:
            data = sets[dataset, spec]
            samples = random_samples(data.samples("test"), tested.images or None, tested.seed)
            prompts = prompts_of(run.file, data.templates)
            key = (base_name(run.file), dataset, tuple(prompts))
            models = {"after": tuned} if key in known else {"before": base.model, "after": tuned}
            with counting("images", len(models) * len(samples), f"{run.path}, {dataset}") as tick:
                for when, model in models.items():
                    images = analysis.batches(data, samples, tested.batch_size, device)
                    if model is tuned and prompted is not None:
                        percent, count = prompted.percent_among(data.classnames, images, tick)
                    else:
                        classes = encode_prompts(model, tokenizer, data.classnames, prompts, device)
                        (percent,), count = zero_shot_accuracy(model, classes[None], images, tick)
                    known[key if when == "before" else (key, run.path)] = percent, count
            (before, count), (after, _) = known[key], known[key, run.path]
            results.append(Forgetting(dataset, count, data.num_classes, before, after))
        yield results


FILE = "landscape.json"
AGREE = 1e-4
"""Largest difference between the loss at a corner and the run's own loss."""

_FOUND = ("labels", "losses", "images", "trained_on", "data_set")
"""Facts that are known once the first row is begun, and needed to plot."""


@dataclass(frozen=True)
class Settings:
    """Options that a grid depends on, besides the runs.

    Attributes:
        positions: paper: the runs at (0,0), (1,0) and (0.5,1). equilateral: the third at (0.5,0.866)
        grid: Points per side of the square
        margin: The square reaches from -X to 1 + X. By default the paper's positions are on the grid
        share: Fraction of the training images for the loss, the same at all points
        seed: Seed that selects these images
        dataset: Dataset, if it is not the first run's
        root: Folder with the data
    """

    positions: Literal["paper", "equilateral"] = "paper"
    grid: Annotated[int, at_least(3)] = 25
    margin: Annotated[float, between(0, 100)] = 0.7
    share: Annotated[float, Check(lambda share: 0 < share <= 1, "a share above 0 and up to 1")] = 0.05
    seed: int = 0
    dataset: str | None = None
    root: Root = None


def landscape(
    runs: Runs = (),
    *,
    resume: Folder | None = None,
    settings: Settings = Settings(),
    batch_size: Count = 256,
    device: Device = "auto",
    output: analyze.NewFolder = None,
) -> int:
    """Draw the loss on the plane through three trained models, as contours (Figures 4b and 5).

    A grid point has the weights a1 RUN1 + a2 RUN2 + a3 RUN3, a1 + a2 + a3 = 1, with merged updates and heads.

    Examples:
        randlora-pl analyze landscape runs/lora runs/randlora runs/full
        randlora-pl analyze landscape --resume DIR       resume after Ctrl-C or a crash, or draw a finished one again

    Args:
        runs: Three runs or adapters with the same base model and dataset
        resume: Folder of a landscape, with the options of its start
        batch_size: Images per batch

    Note:
        landscape.json has every loss. The plots are cut off 20 % above the highest of the three losses. The dashed line
        is the path on the grid with the lowest maximum.
    """
    if resume is not None:
        given = [f"--{name}" for name, value in vars(settings).items() if value != getattr(Settings, name)]
        given += ["--output"] if output else []
        if runs or given:
            what = given[0] if given else "a run"
            raise UserError(f"--resume uses the options in {resume}/{FILE}: leave out {what}.")
        state = _read(resume)
    elif len(runs) != 3:
        raise UserError(f"analyze landscape: expected three runs, got {len(runs)}.")
    else:
        state = {"runs": [str(path) for path in runs], **vars(settings), "rows": [None] * settings.grid}
    opened = [analyze.open_run(Path(path)) for path in state["runs"]]
    prints = []
    for run in opened:  # a hash changes with every tensor and option of an adapter
        sums = run.file.config.get("sha256") or {name: float(t.double().sum()) for name, t in run.file.tensors.items()}
        prints.append(hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest())
    if state.setdefault("fingerprints", prints) != prints:
        raise UserError(f"an adapter of {resume} has changed. Start again: randlora-pl analyze landscape RUN RUN RUN")
    folder = resume
    if None in state["rows"]:
        with analyze.advised(batch_size):
            folder = _compute(opened, state, resume, batch_size, device, output)
    assert folder is not None
    from randlora_pl.lab.analysis.figures import write_figure
    from randlora_pl.lab.bench.report import write_json

    heights = [[float("inf") if value is None else value for value in row] for row in state["rows"]]
    about = f"{state['images']:,} of {state['trained_on']:,} training images of {state['data_set']}"
    (one, two, three), (first, second, third) = state["labels"], state["losses"]
    drawn = analysis.Landscape(
        (one, two, three), analysis.POSITIONS[state["positions"]], (first, second, third),
        analysis.Grid(state["grid"], state["margin"]), heights, about,
    )  # fmt: skip
    barriers = drawn.barriers()
    write_json(state | {"values": drawn.grid.values, "barriers": barriers}, folder / FILE)
    write_figure(analysis.contour_figure(drawn), folder, "landscape")
    print("\nBarrier between two models on the path with the lowest maximum, above the higher of their losses:")
    for pair, height in barriers.items():
        print(f"  {pair}: {height:.4f}")
    if not drawn.on_grid:
        print(
            "The models are not points of this grid, so the barriers are approximate (use --grid 25 --positions paper)."
        )
    analyze.print_output(folder)
    return 0


def _read(folder: Path) -> dict[str, Any]:
    """Read a grid that was begun."""
    file = folder / FILE
    if not file.is_file():
        raise UserError(f"{folder} holds no landscape: it has no {FILE}. Start one with three runs.")
    try:
        state = dict(parse_json(file.read_text(encoding="utf-8")))
        rows = state["rows"]
        if len(rows) != state["grid"] or len(state["runs"]) != 3:
            raise ValueError("rows are missing")
        if any(row is not None and len(row) != state["grid"] for row in rows):
            raise ValueError("points of a row are missing")
        needed = {*vars(Settings()), *(() if None in rows else _FOUND)}
        if lacking := sorted(needed - state.keys()):
            raise ValueError(f"it lacks {', '.join(lacking)}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is cut off or damaged ({error}); start again with three runs.") from error
    return state


def _compute(
    runs: list[analyze.AnalyzedRun],
    state: dict[str, Any],
    folder: Path | None,
    batch_size: int,
    device: str,
    output: str | None,
) -> Path:
    """Compute the missing rows; each is in the file before the next begins."""
    from randlora_pl.interop.base_model import same_base
    from randlora_pl.lab.analysis.models import check_classes, stratified_fraction
    from randlora_pl.lab.bench.report import write_json

    where = pick_device(device)
    for run in runs:
        run.file.adapter.require_matrix("the landscape", run.path)
    same_base([run.file for run in runs])
    tasks = [analyze.task_of(run, where) for run in runs]
    carrier = tasks[0]
    data = analyze.data_of(runs[0], carrier.image_spec, state["dataset"], state["root"], batch_size)
    data.prepare_data()
    data.setup("fit")
    for run, task in zip(runs, tasks, strict=True):
        if type(task) is not type(carrier):
            what = f"{runs[0].path} by {type(carrier).__name__}, {run.path} by {type(task).__name__}"
            raise UserError(f"the runs were trained by different tasks ({what}), so they have no common loss.")
        if task.has_classes:
            check_classes(data, task.classnames)
    chosen = stratified_fraction(data.samples("train"), state["share"], state["seed"])
    kept = list(analysis.batches(data, chosen, batch_size, where))
    own = [analysis.loss(task, kept) for task in tasks]
    corners = analysis.POSITIONS[state["positions"]]
    plane = analysis.Plane.through(tasks, corners)
    at_corners = []
    for corner in corners:
        plane.write_point(*corner)
        at_corners.append(analysis.loss(carrier, kept))
    apart = max(abs(one - other) for one, other in zip(own, at_corners, strict=True))
    if not apart <= AGREE:
        raise UserError(f"the plane's corners have the losses {at_corners}, the runs {own}: they do not fit.")
    facts = {
        "labels": analyze.labels_of(runs), "images": len(chosen), "trained_on": len(data.samples("train")),
        "data_set": data.row.name, "losses": own, "corners_differ_by": apart, "distances": plane.distances(),
    }  # fmt: skip
    if "losses" in state and max(abs(a - b) for a, b in zip(state["losses"], own, strict=True)) > AGREE:
        raise UserError(f"the runs' losses are {own} now, and were {state['losses']}: the data changed. Start again.")
    state |= {name: value for name, value in facts.items() if name not in state}
    print(
        f"Loss on {len(chosen):,} of {len(data.samples('train')):,} training images of {data.row.name}: "
        + ", ".join(f"{label} {value:.4f}" for label, value in zip(state["labels"], own, strict=True))
    )
    print(f"The plane's corners differ from the runs' own losses by {apart:.1e} at most")
    folder = folder or analyze.new_output(output, "landscape")
    write_json(state, folder / FILE)
    values = analysis.Grid(state["grid"], state["margin"]).values
    missing = [number for number, row in enumerate(state["rows"]) if row is None]
    try:
        with counting("rows", len(missing)) as tick:
            for done, number in enumerate(missing):
                begun = time.perf_counter()
                row = []
                for x in values:
                    plane.write_point(x, values[number])
                    row.append(analysis.loss(carrier, kept))
                state["rows"][number] = [value if value < float("inf") else None for value in row]
                write_json(state, folder / FILE)
                if not done:
                    took = time.perf_counter() - begun
                    every = duration(took * len(missing))
                    print(f"A row of {len(values)} points took {duration(took, 1)}: about {every} in all")
                tick(1)
    except KeyboardInterrupt as stop:
        raise type(stop)(f"resume with: randlora-pl analyze landscape --resume {folder}") from stop
    return folder
