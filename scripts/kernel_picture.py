"""Draw docs/kernels.png from docs/kernels.csv: alignments of tangent kernels against the trained parameters.

python scripts/kernel_picture.py        in the checkout, after docs/kernels.csv was renewed
"""

from pathlib import Path

from pandas import read_csv

from randlora_pl.lab.analysis.figures import colors, legend, new_figure

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    """Draw a panel for each model: lines of methods with several sizes, and their spread over seeds as bars."""
    values = read_csv(DOCS / "kernels.csv")
    kind = values["method"].replace({r"-\d+$": "", r"-\d+, ": ", "}, regex=True)
    seeds = values.assign(kind=kind).groupby(["model", "kind", "trained", "seed"])["alignment"].mean()
    groups = seeds.groupby(["model", "kind", "trained"])
    rows = groups.agg(["mean", "std"]).reset_index()
    figure = new_figure(10, 3.8, "")
    color, models = colors(sorted(rows["kind"].unique())), values["model"].unique()
    for axes, model in zip(figure.subplots(1, len(models), sharex=True, sharey=True), models, strict=True):
        axes.set(xscale="log", xlim=(1e4, 2e6), title=model, xlabel="trained parameters")
        for name, own in color.items():
            part = rows[(rows["model"] == model) & (rows["kind"] == name)]
            axes.errorbar(part["trained"], part["mean"], part["std"], marker="o", capsize=3, color=own, label=name)
        axes.grid(alpha=0.3)
    figure.supylabel("alignment with full fine-tuning")
    legend(figure, axes, len(color))
    figure.savefig(DOCS / "kernels.png", dpi=110)


if __name__ == "__main__":
    main()
