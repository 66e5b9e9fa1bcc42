"""The errors that LoRA and RandLoRA leave of an update, against their parameters and by layer."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from randlora_pl.analysis.figures import footnote, new_figure
from randlora_pl.analysis.represent import LayerFit, mean_error

NOTE = (
    "LoRA: truncated SVD, the optimum; equation 8 with the square root that the paper leaves out (a Frobenius norm is "
    "the root of the sum of squares).\n"
    "RandLoRA: lambda and gamma of equation 4 by alternating least squares, a local optimum."
)


def represent_figure(fits: Mapping[int, list[LayerFit]], title: str) -> Figure:
    """Errors over all layers against the number of parameters, and those of each layer at the largest budget.

    Args:
        fits: The layers by LoRA's rank.
        title: Whose update it is.
    """
    figure = new_figure(11.5, 4.8, title)
    budgets, layers = figure.subplots(1, 2, sharey=True)
    largest = fits[max(fits)]
    places = range(1, len(largest) + 1)
    for which, label, colour in (
        ("lora", "LoRA, best possible", "#ff7f0e"),
        ("randlora", "RandLoRA, fitted", "#1f77b4"),
    ):
        counts = [sum(getattr(one, f"{which}_parameters") for one in each) for each in fits.values()]
        errors = [mean_error(each, which) for each in fits.values()]
        budgets.plot(counts, errors, marker="o", color=colour, label=label)
        layers.plot(places, [getattr(one, which) for one in largest], marker="o", markersize=4, color=colour)
    budgets.set(xscale="log", xlabel="trained parameters", ylabel="relative error (Frobenius)", ylim=(0, 1.05))
    budgets.set_title("all layers: root of the mean square", fontsize=10)
    layers.set(xlabel="layer, in the model's order")
    layers.set_title(f"each layer, at the budget of LoRA rank {max(fits)}", fontsize=10)
    for axes in (budgets, layers):
        axes.grid(alpha=0.3)
    budgets.legend(loc="lower left", fontsize=9)
    footnote(figure, NOTE)
    return figure
