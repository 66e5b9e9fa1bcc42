"""Figure 4a: CKA by depth, attention and MLP side by side."""

from collections.abc import Iterable, Mapping

from matplotlib.figure import Figure

from randlora_pl.analysis.cka import KINDS, Layer
from randlora_pl.analysis.figures import colours, footnote, legend, new_figure
from randlora_pl.utils.text.printable import for_figure


def mean_over_data_sets(found: Iterable[Mapping[Layer, float]]) -> dict[Layer, float]:
    """The mean CKA of each layer over several comparisons of the same depth."""
    every = list(found)
    return {place: sum(one[place] for one in every) / len(every) for place in every[0]}


def cka_figure(curves: Mapping[str, Mapping[Layer, float]], reference: str, about: str) -> Figure:
    """A line for each model.

    Args:
        curves: CKA by layer, by label.
        reference: What it was compared with.
        about: On which images.
    """
    figure = new_figure(9.5, 4.2, "")
    panels = figure.subplots(1, len(KINDS), sharey=True)
    for axes, kind in zip(panels, KINDS, strict=True):
        for label, colour in colours(list(curves)).items():
            line = {number + 1: value for (number, which), value in curves[label].items() if which == kind}
            axes.plot(list(line), list(line.values()), marker="o", markersize=4, color=colour, label=for_figure(label))
        axes.set(xlabel="block", title="self-attention" if kind == "attention" else "MLP")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel(for_figure(f"CKA with {reference}"))
    legend(figure, panels[0], 3)
    footnote(figure, about)
    return figure
