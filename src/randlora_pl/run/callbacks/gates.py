"""Gates of HydraLoRA in a test: mean weight of each head by class or dataset and layer, as plot and table."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from randlora_pl.adapters.base import DeltaWeight
from randlora_pl.run.callbacks.figures import FOLDER, LABELLED, MOST_CLASSES, short, write_plots
from randlora_pl.tasks.module import own_module
from randlora_pl.utils.files import write_text
from randlora_pl.utils.run_files import run_folder
from randlora_pl.utils.text import csv_text, for_figure

if TYPE_CHECKING:  # needed at the end of a run only
    from matplotlib.figure import Figure


class Gates(Callback):
    """Plot the mean gate of each head of HydraLoRA by class, or by dataset where the tests are questions.

    A mean is over the tokens of each sample, then over samples. It leaves out the text tower of CLIP models, padding,
    and generated tokens. Other methods have no gates, and blocks that ``torch_compile`` compiled do not show theirs.
    The metric ``test/gate_entropy`` is the mean entropy of a token's gates relative to the largest possible one. It is
    1 if all heads have equal gates, 0 if each token uses a single head.
    """

    def __init__(self) -> None:
        self._layers: dict[str, DeltaWeight] = {}
        self._sums: dict[str, Tensor] = {}
        self._batch: dict[str, tuple[Tensor, Tensor]] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the gates of all layers."""
        self._stop()
        module = own_module(pl_module)
        task = module.objective
        if module.test_name != "test" or task.torch_compile or task.adapter.fixed:
            return
        items = getattr(trainer.datamodule, "items", None)  # type: ignore[attr-defined]
        groups = list(dict.fromkeys(item.task for item in items)) if items else list(task.label_names)
        self._groups = groups or ["all samples"]
        updates = {
            path.replace(".delta", ""): module
            for path, module in task.model.named_modules()
            if isinstance(module, DeltaWeight) and module.heads
        }
        image = {path: delta for path, delta in updates.items() if path.startswith("visual.")}
        self._layers = image or updates  # without the text tower of a CLIP model
        for name, delta in self._layers.items():
            # (groups, heads + 2): gates, entropies, number of samples
            self._sums[name] = torch.zeros(len(self._groups), delta.heads + 2, device=pl_module.device)
            delta.listener = partial(self._listen, name)

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any) -> None:
        """Prepare for the gates of a batch."""
        self._batch, self._size, self._mask = {}, len(batch["weight"]), batch.get("attention_mask")

    def _listen(self, name: str, gates: Tensor) -> None:
        """Keep the mean gates (b, heads) and entropies (b,) of the first use of a layer in a batch."""
        if name not in self._batch and (means := sample_means(gates, self._size, self._mask)) is not None:
            self._batch[name] = means

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Add the means of a batch to the sums of its classes or datasets."""
        counts = batch["weight"] > 0
        if not self._batch or not isinstance(outputs, dict):
            return
        items = getattr(trainer.datamodule, "items", None)  # type: ignore[attr-defined]
        group = torch.zeros_like(counts, dtype=torch.int64)
        if items:
            numbers = [self._groups.index(items[number].task) for number in batch["index"].tolist()]
            group = torch.tensor(numbers, device=counts.device)
        elif len(self._groups) > 1:
            group = outputs["label"]
        for name, (gates, entropy) in self._batch.items():
            rows = torch.cat([gates, entropy[:, None], torch.ones_like(entropy)[:, None]], 1).float()
            self._sums[name].index_add_(0, group[counts], rows[counts])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the entropy, and write the plot and the table."""
        if not self._sums:
            return
        sums: Any = pl_module.all_gather(torch.stack(list(self._sums.values())))
        layers, groups = list(self._sums), self._groups
        self._stop()
        sums = (sums.sum(0) if sums.dim() > 3 else sums).double().cpu()
        if not sums[..., -1].any():
            return
        means, samples = sums[..., :-1] / sums[..., -1:], sums[..., -1]
        entropy = float(sums[..., -2].sum() / samples.sum())
        pl_module.log("test/gate_entropy", entropy, rank_zero_only=False, sync_dist=False)
        if not trainer.is_global_zero:
            return
        header = ["layer", "group", "samples", *(f"head {k}" for k in range(1, means.shape[2])), "entropy"]
        rows = [
            [layer, group, int(samples[i, j]), *(f"{value:.6f}" for value in means[i, j].tolist())]
            for i, layer in enumerate(layers)
            for j, group in enumerate(groups)
            if samples[i, j]
        ]
        write_text(run_folder(trainer) / FOLDER / "gates.csv", csv_text([header, *rows]))
        used = samples[0] > 0
        names = [group for group, any_sample in zip(groups, used.tolist(), strict=True) if any_sample]
        if len(names) <= MOST_CLASSES:
            title = f"mean gate of each head; mean entropy of a token's gates: {entropy:.3f} of the largest"
            write_plots(trainer, {"gates": partial(gates_figure, means[:, used, :-1], layers, names, title)})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        self._stop()

    def _stop(self) -> None:
        for delta in self._layers.values():
            delta.listener = None
        self._layers, self._sums, self._batch = {}, {}, {}


def sample_means(gates: Tensor, size: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """Return the mean gates (b, heads) and mean entropies (b,) of the samples of a batch, or None for other inputs.

    Args:
        gates: (b, tokens ..., heads), (tokens, b, heads), or with the windows or beams of a sample in succession.
        size: Number b of samples.
        mask: Attention mask of the texts, (b, length); the layer may see all tokens but the last.
    """
    heads = gates.shape[-1]
    weight = None
    if mask is not None:
        length = gates.shape[1] if gates.dim() == 3 else 0
        if gates.shape[0] != size or length not in (mask.shape[1], mask.shape[1] - 1) or not length:
            return None
        weight = mask[:, :length, None].to(gates.dtype)
    elif gates.shape[0] % size == 0:
        gates = gates.reshape(size, -1, heads)
    elif gates.dim() == 3 and gates.shape[1] == size:
        gates = gates.transpose(0, 1)
    else:
        return None
    entropy = torch.special.entr(gates).sum(-1, keepdim=True) / max(math.log(heads), 1e-9)
    both = torch.cat([gates, entropy], -1)
    means = both.mean(1) if weight is None else (both * weight).sum(1) / weight.sum(1).clamp(min=1)
    return means[:, :-1], means[:, -1]


def gates_figure(means: Tensor, layers: Sequence[str], groups: Sequence[str], title: str = "") -> "Figure":
    """Plot mean gates: a row for each class or dataset, a column for each head, over all layers and of each layer.

    Args:
        means: Mean gates, (layers, groups, heads).
        layers: Names of the layers.
        groups: Names of the classes or datasets.
        title: Heading.
    """
    from matplotlib.figure import Figure

    heads, names = means.shape[2], ["all", *groups]
    blocks = torch.cat([means.mean(0, keepdim=True), means])  # of all layers first
    blocks = torch.cat([blocks.mean(1, keepdim=True), blocks], 1)  # of all groups first
    gap = torch.full((len(blocks), len(names), 1), math.nan, dtype=blocks.dtype)
    picture = torch.cat([blocks, gap], 2).transpose(0, 1).flatten(1)[:, :-1]
    size = min(22.0, 2.5 + 0.14 * picture.shape[1]), min(14.0, 2.2 + 0.2 * len(names))
    figure = Figure(figsize=(max(5.0, size[0]), max(3.5, size[1])))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot(facecolor="#999999")  # between the layers
    reach = max(0.01, float((means - 1 / heads).abs().max()))
    shown = axes.imshow(picture.numpy(), vmin=1 / heads - reach, vmax=1 / heads + reach, cmap="RdBu_r", aspect="auto")
    parts = [layer.split(".") for layer in layers]
    alike = takewhile(lambda names: len(set(names)) == 1, zip(*(part[:-1] for part in parts), strict=False))
    start = [names[0] for names in alike]
    labels = ["all layers", *(".".join(part[len(start) :]) for part in parts)]
    axes.set_xticks([k * (heads + 1) + (heads - 1) / 2 for k in range(len(labels))], labels, rotation=90, fontsize=7)
    if len(groups) <= LABELLED:
        axes.set_yticks(range(len(names)), [for_figure(short(name)) for name in names], fontsize=8)
    axes.axhline(0.5, color="black", linewidth=0.8)
    axes.axvline(heads, color="black", linewidth=0.8)
    axes.set_xlabel(f"heads 1 to {heads} of each layer" + (f" in {'.'.join(start)}" if start else ""), fontsize=8)
    axes.set_title(title, fontsize=9)
    figure.colorbar(shown, ax=axes, label=f"mean gate (white: 1 / {heads})")
    return figure
