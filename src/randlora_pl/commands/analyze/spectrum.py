"""``analyze spectrum``: rank and singular values of updates."""

from randlora_pl.commands.analyze import NewFolder, labels_of, open_run, parameters, print_output, write_output
from randlora_pl.utils.errors import UserError, errors_in
from randlora_pl.utils.options import Runs
from randlora_pl.utils.text import table


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
    from randlora_pl.lab.analysis.spectrum import common_layers, layer_spectrum, matrix_updates, means, spectrum_figure

    opened = [open_run(path) for path in runs]
    found = {}
    for label, run in zip(labels_of(opened), opened, strict=True):
        updates = matrix_updates(run.file)
        if not updates:
            raise UserError(f"{run.path} changes no matrix of a layer ({label}), so it has no spectrum.")
        with errors_in(run.path):
            found[label] = [layer_spectrum(layer, update) for layer, update in updates.items()]
    shared = common_layers(list(found.values()))
    rows, cells, content = [], [], []
    for (label, layers), run in zip(found.items(), opened, strict=True):
        rows += [{"adapter": label} | one.as_row() for one in layers]
        mean = means([one for one in layers if one.layer in shared])
        facts = {"adapter": label, "path": str(run.path), "parameters": parameters(run), "mean": mean}
        content.append(facts | {"layers": [o.as_row() | {"singular_values": o.values.tolist()} for o in layers]})
        count = sum(one.layer in shared for one in layers)
        ranks = [f"{mean[key]:.1f}" for key in ("rank", "full_rank", "stable_rank", "effective_rank")]
        cells.append([label, f"{parameters(run):,}", f"{count} of {len(layers)}", *ranks, f"{mean['norm']:.3f}"])
    folder = write_output(output, "spectrum", rows, content, spectrum_figure(found))
    header = ("adapter", "parameters", "layers", "rank", "of", "stable rank", "effective rank", "norm")
    print(f"Means over the {len(shared)} layers that all of them change:\n")
    print(table(header, cells))
    print_output(folder)
    return 0
