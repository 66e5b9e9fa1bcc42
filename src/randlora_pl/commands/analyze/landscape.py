"""``analyze landscape``: the loss on the plane through three runs, a grid that resumes after a kill."""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from randlora_pl.commands import analyze
from randlora_pl.commands.common import counting, pick_device
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import parse_json
from randlora_pl.utils.options import Check, Count, Device, Folder, Root, Runs, at_least, between
from randlora_pl.utils.text import duration

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
    from randlora_pl.lab.analysis.landscape import POSITIONS, Grid, Landscape, contour_figure
    from randlora_pl.lab.bench.report import write_json

    heights = [[float("inf") if value is None else value for value in row] for row in state["rows"]]
    about = f"{state['images']:,} of {state['trained_on']:,} training images of {state['data_set']}"
    (one, two, three), (first, second, third) = state["labels"], state["losses"]
    drawn = Landscape(
        (one, two, three), POSITIONS[state["positions"]], (first, second, third),
        Grid(state["grid"], state["margin"]), heights, about,
    )  # fmt: skip
    barriers = drawn.barriers()
    write_json(state | {"values": drawn.grid.values, "barriers": barriers}, folder / FILE)
    write_figure(contour_figure(drawn), folder, "landscape")
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
    from randlora_pl.data.unlabelled import batches
    from randlora_pl.interop.base_model import same_base
    from randlora_pl.lab.analysis.landscape import POSITIONS, Grid, Plane, check_classes, loss, stratified_fraction
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
    kept = list(batches(data, chosen, batch_size, where))
    own = [loss(task, kept) for task in tasks]
    corners = POSITIONS[state["positions"]]
    plane = Plane.through(tasks, corners)
    at_corners = []
    for corner in corners:
        plane.write_point(*corner)
        at_corners.append(loss(carrier, kept))
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
    values = Grid(state["grid"], state["margin"]).values
    missing = [number for number, row in enumerate(state["rows"]) if row is None]
    try:
        with counting(True, "{task.completed} of {task.total} rows", len(missing)) as tick:
            for done, number in enumerate(missing):
                begun = time.perf_counter()
                row = []
                for x in values:
                    plane.write_point(x, values[number])
                    row.append(loss(carrier, kept))
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
