"""``analyze cka``: similarity of activations to the activations of full fine-tuning."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from randlora_pl.commands import analyze
from randlora_pl.commands.common.terminal import pick_device
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Runs
from randlora_pl.utils.text import table

if TYPE_CHECKING:
    import torch

    from randlora_pl.lab.analysis.cka import Layer


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
    from randlora_pl.lab.analysis.cka import cka_figure

    rows: list[dict[str, Any]] = []
    curves: dict[str, list[dict[Layer, float]]] = {}
    counts = []
    for name, members in groups.items():
        with analyze.advised(tested.batch_size):
            count, found = _compare(members, dataset, tested, device)
        counts.append(f"{count:,} test images of {name}")
        for run in members[1:]:
            values = found[str(run.path)]
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
    figure = cka_figure(mean, reference, "; ".join(counts))
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
    from randlora_pl.commands.common.terminal import counting
    from randlora_pl.data.unlabelled import batches, random_samples
    from randlora_pl.lab.analysis.cka import compare

    reference = analyze.task_of(first, device)
    data = analyze.data_of(first, reference.image_spec, dataset, tested.root, tested.batch_size)
    data.prepare_data()
    data.setup("test")
    samples = random_samples(data.samples("test"), tested.images or None, tested.seed)
    tasks = {str(run.path): analyze.task_of(run, device) for run in others}
    for name, task in tasks.items():
        if task.image_spec != reference.image_spec:
            raise UserError(f"{name} uses other image settings than {first.path}: they cannot be compared.")
    with counting(True, f"{data.row.name}: {{task.completed:,}} of {len(samples):,} images") as tick:

        def images() -> Any:
            for batch, _ in batches(data, samples, tested.batch_size, device):
                yield batch
                tick(len(batch))

        return len(samples), compare(reference.model, {name: task.model for name, task in tasks.items()}, images())
