"""Plot of CKA by depth, attention and MLP side by side (Figure 4a of the paper)."""

from collections.abc import Iterable, Mapping

from matplotlib.figure import Figure

from randlora_pl.analysis.cka import KINDS, Layer
from randlora_pl.analysis.figures import colors, footnote, legend, new_figure
from randlora_pl.utils.text.printable import for_figure


def mean_over_data_sets(found: Iterable[Mapping[Layer, float]]) -> dict[Layer, float]:
    """Return the mean CKA of each layer over several comparisons of equal depth."""
    every = list(found)
    return {layer: sum(one[layer] for one in every) / len(every) for layer in every[0]}


def cka_figure(curves: Mapping[str, Mapping[Layer, float]], reference: str, about: str) -> Figure:
    """Plot one line per model.

    Args:
        curves: CKA by layer, by label.
        reference: Name of the reference model.
        about: Footnote with the images.
    """
    figure = new_figure(9.5, 4.2, "")
    panels = figure.subplots(1, len(KINDS), sharey=True)
    for axes, kind in zip(panels, KINDS, strict=True):
        for label, color in colors(list(curves)).items():
            line = {number + 1: value for (number, which), value in curves[label].items() if which == kind}
            axes.plot(list(line), list(line.values()), marker="o", markersize=4, color=color, label=for_figure(label))
        axes.set(xlabel="block", title="self-attention" if kind == "attention" else "MLP")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel(for_figure(f"CKA with {reference}"))
    legend(figure, panels[0], 3)
    footnote(figure, about)
    return figure
