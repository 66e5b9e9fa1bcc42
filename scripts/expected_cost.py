"""The table of hours in docs/reproducing.md: counted operations over an assumed speed of a GPU, not measured.

Usage: python scripts/expected_cost.py [--share 0.3] [table11 ...]
"""

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from randlora_pl.cli.cells import composer
from randlora_pl.cli.sweep_job import told_by
from randlora_pl.experiments.paper.paper import table
from randlora_pl.experiments.sweep.estimate import Estimator, planned_steps
from randlora_pl.experiments.sweep.folder import SweepFolder
from randlora_pl.experiments.sweep.plan import Cell, plan

SWEEPS = (
    *("table2", "table3", "table5", "table7", "table10", "table11", "table12", "table13", "table14"),
    *("figure1", "figure2", "figure3"),
)
PEAKS = {"RTX 4090": 165e12, "A100": 312e12}
"""Operations a second in bfloat16 with sums in float32, without sparsity, as the vendor states them."""
LARGE = "CLIP-ViT-H/14"
"""What the paper trained on an A100; the others on an RTX 4090 (section C.6.1)."""
SHARE = 0.3
"""Share of the peak that a whole training is taken to reach; `sweep --dry-run` assumes the same of a CPU."""
COUNTED_AT = 0.3
"""The share that `Estimator` assumes already."""
TIME = "training time (% of reference)"


def gpu_of(cell: Cell) -> str:
    """The paper's GPU for a cell's model."""
    return "A100" if cell.labels.model == LARGE else "RTX 4090"


def factor(cell: Cell) -> float:
    """Time relative to full fine-tuning by Table 10; that of ViT-B/32 for DINOv2, 1 for methods not in it."""
    method = {"LoRA": "LoRA-32", "RandLoRA": "RandLoRA"}.get(str(cell.flat["model.adapter"]).rpartition(".")[2])
    if method is None or cell.untrained:
        return 1.0
    model = cell.labels.model.partition(",")[0]
    model = model if model in table(10).models else "CLIP-ViT-B/32"
    (printed,) = (c for c in table(10).cells if (c.model, c.method, c.column) == (model, method, TIME))
    return printed.value / 100


def cells_of(name: str) -> tuple[list[Cell], int]:
    """The cells of a shipped sweep for its first seed, and its number of seeds."""
    _, description = told_by(name)
    return plan(replace(description, seeds=description.seeds[:1]), composer(None)), len(description.seeds)


def hours(cells: Iterable[Cell], share: float = SHARE) -> dict[str, float]:
    """Hours by GPU."""
    cells = list(cells)
    counters = {name: Estimator(SweepFolder(Path("nowhere")), cells, lambda p=peak: p) for name, peak in PEAKS.items()}
    found: dict[str, float] = {}
    for cell in cells:
        gpu = gpu_of(cell)
        seconds = counters[gpu].counted(cell).seconds
        assert seconds is not None, cell.labels
        found[gpu] = found.get(gpu, 0.0) + seconds * factor(cell) * COUNTED_AT / share / 3600
    return found


def row(name: str, share: float = SHARE) -> list[str]:
    """Name, runs, runs of one seed, their optimizer steps, their hours, hours of all."""
    cells, seeds = cells_of(name)
    steps = sum(planned_steps(cell) or 0 for cell in cells if not cell.untrained)
    found = hours(cells, share)
    each = " + ".join(f"{_short(value)} on {gpu}" for gpu, value in found.items())
    return [name, f"{seeds * len(cells):,}", f"{len(cells):,}", f"{steps:,}", each, _short(seeds * sum(found.values()))]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweeps", nargs="*", default=SWEEPS)
    parser.add_argument("--share", type=float, default=SHARE, help="share of the GPU's peak")
    given = parser.parse_args()
    print("| sweep | runs | of one seed | their optimizer steps | hours of one seed | hours of all |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in given.sweeps:
        print("| " + " | ".join(row(name, given.share)) + " |", flush=True)
    wanted = ("imagenet", "16-shot", "RandLoRA-10")
    one = [cell for cell in cells_of("table5")[0] if cell.labels[1:4] == wanted]
    print(f"\nRandLoRA-10, 16 shots of ImageNet: {60 * sum(hours(one, given.share).values()):.1f} minutes")


if __name__ == "__main__":
    main()
