"""The tables of hours and memory in docs/reproducing.md: counted, with an assumed speed of a GPU; not measured on one.

Usage: python scripts/expected_cost.py [--share 0.3] [table11 ...]
       python scripts/expected_cost.py --memory
       python scripts/expected_cost.py --texts
"""

import argparse
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import yaml
from operations import operations

from randlora_pl.adapters import FullFineTuning, LoRA, RandLoRA, inject
from randlora_pl.cli.sweep.job import find_sweep
from randlora_pl.config.shipped import find_config
from randlora_pl.experiments.paper.paper import table
from randlora_pl.experiments.sweep.estimate import memory_of
from randlora_pl.experiments.sweep.expand import counts
from randlora_pl.experiments.sweep.plan import Trial, plan
from randlora_pl.experiments.sweep.steps import is_text, planned_steps
from randlora_pl.models import meta_clip, meta_vit

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


class Kept(NamedTuple):
    """What a model keeps for the backward pass under bf16-mixed, in MB.

    Counted by `randlora_pl.bench.memory.saved_tensors` on a CPU, random weights, for 1 and 3 images or captions; the
    difference is what one takes. The model of 1 billion parameters was counted with LoRA only.

    Attributes:
        casts: Weights in bfloat16.
        image: An image, with LoRA-32.
        full: An image, with full fine-tuning.
        caption: A caption.
    """

    casts: float
    image: float
    full: float
    caption: float


class Model(NamedTuple):
    """A config, the images of a micro-batch for adapters and for full fine-tuning, RandLoRA's rank, what is kept."""

    config: str
    batch: int
    full_batch: int
    rank: int
    kept: Kept


MEMORY = {
    "CLIP-ViT-B/32": Model("clip_vitb32", 128, 128, 6, Kept(255, 14.9, 15.3, 17.3)),
    "CLIP-ViT-L/14": Model("clip_vitl14", 64, 64, 8, Kept(797, 203.8, 204.5, 25.8)),
    "CLIP-ViT-H/14": Model("clip_vith14", 64, 32, 10, Kept(1910, 339.1, 339.1, 68.6)),
    "DINOv2-ViT-B/14": Model("dinov2_vitb14", 128, 128, 6, Kept(175, 86.1, 96.0, 0)),
}


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


def memory_row(name: str, model: Model) -> list[str]:
    """GB of full fine-tuning, LoRA-32 and RandLoRA, with their share of full fine-tuning at the same batch."""
    described = yaml.safe_load(find_config(model.config).read_text(encoding="utf-8"))["model"]["init_args"]["name"]
    kind = partial(meta_clip, described) if model.kept.caption else partial(meta_vit, described.partition(".")[0], 224)
    cells = {}
    for label, adapter in {"full": FullFineTuning(), "LoRA": LoRA(32), "RandLoRA": RandLoRA(model.rank)}.items():
        report = inject(backbone := kind(), adapter)
        frozen = 4 * sum(parameter.numel() for parameter in backbone.parameters())
        built = 2 * sum(row.shape[0] * row.shape[1] for row in report.rows) if label == "RandLoRA" else 0
        fixed = frozen + 12 * report.trainable + built + 1e6 * model.kept.casts
        each = 1e6 * ((model.kept.full if label == "full" else model.kept.image) + model.kept.caption)
        cells[label] = lambda batch, fixed=fixed, each=each: (fixed + batch * each) / 1e9
    whole = cells["full"](model.batch)
    parts = [f"{cells[label](model.batch):.1f} ({100 * cells[label](model.batch) / whole:.0f} %)" for label in cells]
    less = f", {cells['full'](model.full_batch):.1f} at {model.full_batch}" if model.full_batch != model.batch else ""
    return [name, f"{model.batch}", f"{whole:.1f}{less}", *parts[1:]]


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
        print("| model | micro-batch | full fine-tuning, GB | LoRA-32, GB | RandLoRA, GB |\n|---|---:|---:|---:|---:|")
        for name, model in MEMORY.items():
            print("| " + " | ".join(memory_row(name, model)) + " |", flush=True)
        return
    print("| sweep | runs | of one seed | their optimizer steps | hours of one seed | hours of all |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in given.sweeps:
        print("| " + " | ".join(row(name, given.share)) + " |", flush=True)
    wanted = ("imagenet", "16-shot", "RandLoRA-10")
    one = [cell for cell in cells_of("table5")[0] if cell.labels[1:4] == wanted]
    print(f"\nRandLoRA-10, 16 shots of ImageNet: {60 * sum(hours(one, given.share).values()):.1f} minutes")


if __name__ == "__main__":
    main()
