"""Ranks and singular values of adapters' updates by layer (compare Table 2 of the paper)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from randlora_pl.adapters import AdapterFile
from randlora_pl.adapters.sites import is_conv1d, out_and_in
from randlora_pl.adapters.spectrum import Spectrum, spectrum
from randlora_pl.interop.base_model import layer_updates, load_base
from randlora_pl.lab.analysis.figures import FULL, colors, footnote, legend, new_figure
from randlora_pl.utils.errors import errors_in
from randlora_pl.utils.text import for_figure

SMALLEST = 1e-7
"""Lower limit of relative singular values in plots: below it is rounding of float32."""


@dataclass(frozen=True)
class LayerSpectrum:
    """Spectrum of the update (out, in) of one weight; singular values are float64, largest first."""

    layer: str
    shape: tuple[int, int]
    sizes: Spectrum
    values: Tensor

    def as_row(self) -> dict[str, Any]:
        """Return a table row, without the singular values."""
        out_features, in_features = self.shape
        return {"layer": self.layer, "out": out_features, "in": in_features, "full_rank": len(self.values)} | vars(
            self.sizes
        )


def matrix_updates(file: AdapterFile) -> dict[str, Tensor]:
    """Return the update (out, in) of each linear, convolution and attention weight of an adapter, by layer name.

    Full fine-tuning also changes embeddings, norms and biases, which are not matrices of a layer and are left out.

    Raises:
        UserError: The adapter cannot be read, or its base model is required and not available.
    """
    found = layer_updates(file)
    if not file.adapter.trains_base:
        return found
    base = load_base(file)
    updates: dict[str, Tensor] = {}
    for path, module in base.submodule_for(file).named_modules():
        packed = isinstance(module, nn.MultiheadAttention)
        if packed and (key := f"{path}.in_proj_weight") in found:
            updates[f"{path}.in_proj"] = found[key]
        elif out_and_in(module) and (key := f"{path}.weight") in found:
            updates[path] = found[key].T if is_conv1d(module) else found[key].flatten(1)
    return updates


def layer_spectrum(layer: str, update: Tensor) -> LayerSpectrum:
    """Return the spectrum of one update (out, in).

    Raises:
        UserError: The update is not finite; the message has the layer.
    """
    with errors_in(layer):
        sizes = spectrum(update)
    out_features, in_features = update.shape
    return LayerSpectrum(layer, (out_features, in_features), sizes, torch.linalg.svdvals(update.detach().double()))


def common_layers(adapters: Sequence[Sequence[LayerSpectrum]]) -> list[str]:
    """Return the names of the layers that all adapters change, in order; if none, the layers of the first adapter."""
    shared = set.intersection(*({one.layer for one in layers} for layers in adapters))
    return [one.layer for one in adapters[0] if one.layer in shared] or [one.layer for one in adapters[0]]


def means(layers: Sequence[LayerSpectrum]) -> dict[str, float]:
    """Return means over layers: rank, stable rank, effective rank, norm, full rank, and rank divided by full rank."""
    count = max(1, len(layers))
    keys = ("rank", "stable_rank", "effective_rank", "norm")
    found = {key: sum(float(getattr(one.sizes, key)) for one in layers) / count for key in keys}
    found["full_rank"] = sum(len(one.values) for one in layers) / count
    return found | {"share_of_full_rank": sum(one.sizes.rank / len(one.values) for one in layers) / count}


def curve(layers: Sequence[LayerSpectrum], points: int = 200) -> tuple[Any, Any, Any, Any]:
    """Return relative singular values over layers: (index / full rank, median, minimum, maximum).

    Layers of different width are interpolated to one axis; zero updates are left out.
    """
    fractions = np.linspace(0, 1, points)
    rows = []
    for one in layers:
        if one.sizes.spectral_norm > 0:
            values = (one.values / one.values[0]).clamp_min(SMALLEST).numpy()
            rows.append(np.interp(fractions, np.linspace(0, 1, len(values)), values))
    stacked = np.stack(rows or [np.full(points, np.nan)])
    return fractions, np.median(stacked, 0), stacked.min(0), stacked.max(0)


def spectrum_figure(adapters: Mapping[str, Sequence[LayerSpectrum]]) -> Figure:
    """Plot singular values, and rank and effective rank by layer, of several adapters; only common layers are drawn."""
    layers = common_layers(list(adapters.values()))
    figure = new_figure(14, 4.6, "")
    curves, ranks, effective = figure.subplots(1, 3)
    for label, color in colors(list(adapters)).items():
        mine = [one for one in adapters[label] if one.layer in layers]
        fractions, middle, low, high = curve(mine)
        curves.plot(fractions, middle, color=color, label=for_figure(label))
        curves.fill_between(fractions, low, high, color=color, alpha=0.15, linewidth=0)
        numbers = [layers.index(one.layer) + 1 for one in mine]
        size = 6 if color == FULL else 3  # visible behind the other markers
        style: dict[str, Any] = {"color": color, "marker": "o", "markersize": size, "linewidth": 1}
        ranks.plot(numbers, [one.sizes.rank / len(one.values) for one in mine], **style)
        effective.plot(numbers, [one.sizes.effective_rank / len(one.values) for one in mine], **style)
    curves.set(yscale="log", xlabel="index / full rank", ylabel="singular value / largest", ylim=(SMALLEST / 2, 2))
    curves.set_title("singular values: median and range over layers", fontsize=10)
    for axes, title in ((ranks, "rank / full rank"), (effective, "effective rank / full rank")):
        axes.set(ylim=(-0.03, 1.05), xlabel="layer, in the model's order")
        axes.set_title(title, fontsize=10)
    for axes in (curves, ranks, effective):
        axes.grid(alpha=0.3)
    legend(figure, curves)
    footnote(
        figure, f"{len(layers)} layers that all adapters change; effective rank: exp of the entropy of the spectrum"
    )
    return figure
