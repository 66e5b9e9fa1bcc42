"""Plot of the errors of LoRA and RandLoRA on a given update, by parameter count and by layer."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from randlora_pl.analysis.figures import footnote, new_figure
from randlora_pl.analysis.represent import LayerFit, mean_error

NOTE = (
    "LoRA: truncated SVD, the optimum; equation 8 with the square root that the paper omits (a Frobenius norm is "
    "the root of the sum of squares).\n"
    "RandLoRA: lambda and gamma of equation 4 by alternating least squares, a local optimum."
)


def represent_figure(fits: Mapping[int, list[LayerFit]], title: str) -> Figure:
    """Plot the error over all layers by number of parameters, and the error of each layer at the largest budget.

    Args:
        fits: Fits of the layers, by LoRA's rank.
        title: Title of the plot, with the source of the update.
    """
    figure = new_figure(11.5, 4.8, title)
    budgets, layers = figure.subplots(1, 2, sharey=True)
    largest = fits[max(fits)]
    numbers = range(1, len(largest) + 1)
    for which, label, color in (
        ("lora", "LoRA, best possible", "#ff7f0e"),
        ("randlora", "RandLoRA, fitted", "#1f77b4"),
    ):
        counts = [sum(getattr(one, f"{which}_parameters") for one in each) for each in fits.values()]
        errors = [mean_error(each, which) for each in fits.values()]
        budgets.plot(counts, errors, marker="o", color=color, label=label)
        layers.plot(numbers, [getattr(one, which) for one in largest], marker="o", markersize=4, color=color)
    budgets.set(xscale="log", xlabel="trained parameters", ylabel="relative error (Frobenius)", ylim=(0, 1.05))
    budgets.set_title("all layers: root of the mean square", fontsize=10)
    layers.set(xlabel="layer, in the model's order")
    layers.set_title(f"each layer, at the budget of LoRA rank {max(fits)}", fontsize=10)
    for axes in (budgets, layers):
        axes.grid(alpha=0.3)
    budgets.legend(loc="lower left", fontsize=9)
    footnote(figure, NOTE)
    return figure
