"""The tables of hours and memory in docs/reproducing.md: counted, with an assumed speed of a GPU; not measured on one.

Usage: python scripts/expected_cost.py [--share 0.3] [table11 ...]
       python scripts/expected_cost.py --memory
       python scripts/expected_cost.py --texts
"""

import argparse
from collections.abc import Iterable
from dataclasses import replace

from operations import operations

from randlora_pl.bench.trace.step import StepSetup, trace_step
from randlora_pl.bench.trace.table import adapter_of
from randlora_pl.cli.bench.trace import options, step_setup
from randlora_pl.cli.sweep.job import find_sweep
from randlora_pl.experiments.paper.paper import table
from randlora_pl.experiments.sweep.estimate import memory_of
from randlora_pl.experiments.sweep.expand import counts
from randlora_pl.experiments.sweep.plan import Trial, plan
from randlora_pl.experiments.sweep.steps import is_text, planned_steps

SWEEPS = (
    *("table2", "table3", "table5", "table7", "table10", "table11", "table12", "table13", "table14"),
    *("figure1", "figure2", "figure3"),
    *("table1", "table3_llama", "table4", "table6", "table10_llama", "table15"),
)
PEAKS = {"RTX 4090": 165e12, "A100": 312e12}
"""Operations a second in bfloat16 with sums in float32, without sparsity, as the vendor states them."""
LARGE, LLAMA = "CLIP-ViT-H/14", "LLama3"
"""What the paper trained on an A100; the others on an RTX 4090 (section C.6.1)."""
SHARE = 0.3
"""Share of the peak that a whole training is taken to reach."""
TIME = "training time (% of reference)"


MEMORY = {
    "CLIP-ViT-B/32": ("clip_vitb32", ()),
    "CLIP-ViT-L/14": ("clip_vitl14", ()),
    "CLIP-ViT-H/14": ("clip_vith14", (32, 4)),
    "DINOv2-ViT-B/14": ("dinov2_vitb14", ()),
}
"""The config of a model, and the paper's micro-batch and accumulation of full fine-tuning where they differ."""


def gpu_of(cell: Trial) -> str:
    """The paper's GPU for a cell's model."""
    return "A100" if cell.labels.model.startswith((LARGE, LLAMA)) else "RTX 4090"


def factor(cell: Trial) -> float:
    """Time relative to full fine-tuning by Table 10; that of ViT-B/32 for DINOv2, 1 for methods not in it.

    Language models: relative to LoRA, by its rows of Llama-3.
    """
    names = {"LoRA": "LoRA-32", "DoRA": "DoRA-32", "RandLoRA": "RandLoRA"}
    method = names.get(str(cell.flat["model.adapter"]).rpartition(".")[2])
    if method is None or cell.untrained:
        return 1.0
    model = cell.labels.model.partition(",")[0]
    model = "LLama3-8B" if is_text(cell.tree) else model if model in table(10).models else "CLIP-ViT-B/32"
    printed = (c.value for c in table(10).cells if (c.model, c.method, c.column) == (model, method, TIME))
    return next(printed, 100.0) / 100


def cells_of(name: str) -> tuple[list[Trial], int]:
    """The cells of a shipped sweep for its first seed, and its number of seeds."""
    _, description = find_sweep(name)
    return plan(replace(description, seeds=description.seeds[:1])), len(description.seeds)


def hours(cells: Iterable[Trial], share: float = SHARE) -> dict[str, float]:
    """Hours by GPU."""
    found: dict[str, float] = {}
    for cell in cells:
        gpu = gpu_of(cell)
        found[gpu] = found.get(gpu, 0.0) + operations(cell) * factor(cell) / (share * PEAKS[gpu]) / 3600
    return found


def row(name: str, share: float = SHARE) -> list[str]:
    """Name, runs, runs of one seed, their optimizer steps, their hours, hours of all."""
    cells, seeds = cells_of(name)
    steps = sum(planned_steps(cell.tree) or 0 for cell in cells if not cell.untrained)
    found = hours(cells, share)
    each = " + ".join(f"{_short(value)} on {gpu}" for gpu, value in found.items())
    runs = sum(1 if cell.untrained else seeds for cell in cells)
    return [name, f"{runs:,}", f"{len(cells):,}", f"{steps:,}", each, _short(seeds * sum(found.values()))]


def memory_row(name: str, config: str, full: tuple[int, ...]) -> list[str]:
    """GB of full fine-tuning, LoRA-32 and RandLoRA, with their share of full fine-tuning at the same batch."""
    setup, adapter = step_setup(options().parse_args(["--config", config]))

    def peak(method: str, setup: StepSetup = setup) -> float:
        return trace_step(setup, adapter_of(method, setup, adapter))[0].peak / 1e9

    whole, *others = (peak(method) for method in ("full", "lora", "randlora", "randlora-hadamard"))
    less = ""
    if full:
        batch_size, accumulate = full
        less = f", {peak('full', replace(setup, batch_size=batch_size, accumulate=accumulate)):.1f} at {batch_size}"
    parts = [f"{other:.1f} ({100 * other / whole:.0f} %)" for other in others]
    return [name, f"{setup.batch_size}", f"{whole:.1f}{less}", *parts]


def text_rows() -> list[str]:
    """Of each language model: trained parameters and GB of weights, gradients and moments, over the methods."""
    rows = []
    for cells in (cells_of(name)[0] for name in ("table15", "table4")):
        for model in dict.fromkeys(cell.labels.model for cell in cells):
            trained, sizes = [], []
            for cell in {c.labels.method: c for c in cells if c.labels.model == model and not c.untrained}.values():
                found = counts(cell.tree)
                assert found is not None, cell.labels
                trained.append(found.trainable / 1e6)
                sizes.append(memory_of(cell, found) / 1e9)
            batch = next(c.tree["data"].get("batch_size", 64) for c in cells if c.labels.model == model)
            span = [f"{min(values):.2f} to {max(values):.2f}" for values in (trained, sizes)]
            rows.append(f"| {model} | {batch} | {span[0]} | {span[1]} |")
    return rows


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweeps", nargs="*", default=SWEEPS)
    parser.add_argument("--share", type=float, default=SHARE, help="share of the GPU's peak")
    parser.add_argument("--memory", action="store_true", help="the table of memory instead")
    parser.add_argument("--texts", action="store_true", help="the table of memory of language models instead")
    given = parser.parse_args()
    if given.texts:
        print("| model | micro-batch | trained parameters, millions | GB |\n|---|---:|---:|---:|")
        print("\n".join(text_rows()))
        return
    if given.memory:
        print(
            "| model | micro-batch | full fine-tuning, GB | LoRA-32, GB | RandLoRA, GB | with `basis: hadamard`, GB |"
        )
        print("|---|---:|---:|---:|---:|---:|")
        for name, (config, full) in MEMORY.items():
            print("| " + " | ".join(memory_row(name, config, full)) + " |", flush=True)
        return
    print("| sweep | runs | of one seed | their optimizer steps | hours of one seed | hours of all |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in given.sweeps:
        print("| " + " | ".join(row(name, given.share)) + " |", flush=True)
    print()
    for method in ("MaPLe + DePT", "RandLoRA-10"):
        wanted = ("imagenet", "16-shot", method)
        one = [cell for cell in cells_of("table5")[0] if cell.labels[1:4] == wanted]
        print(f"{method}, 16 shots of ImageNet: {60 * sum(hours(one, given.share).values()):.1f} minutes")


if __name__ == "__main__":
    main()
