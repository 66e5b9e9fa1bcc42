"""Show what an untuned rate costs, by the runs of the sweep `one_rate`.

    python scripts/one_rate.py runs/sweeps/one_rate/report

Reads ``cells.csv`` of a report, prints a table and writes ``one_rate.png`` and ``.svg`` to its folder. The best rate
has the highest mean on the test images, and a rate with a failed run has no mean. The plateau is the row of rates whose
means are within a point of the best one. Its width is the factor between its ends, or at least this if an end is the
first or last rate. Half is lost at the next rate above the best without a mean or with less than half of the best.
"""

import argparse
from pathlib import Path

from pandas import DataFrame, Series, read_csv

from randlora_pl.lab.analysis.figures import colors, new_figure, write_figure
from randlora_pl.lab.report import Estimate, shown
from randlora_pl.utils.text import markdown_table

PAPER = {"full fine-tuning": 1e-5}
"""Rate of Table 8; all other methods have 1e-3."""
POINT = 1.0
HEADER = ("data", "method", "best", "rate", "plateau, factor", "at the paper's rate", "loss by it", "half lost at")


def curves(path: Path) -> DataFrame:
    """Return test accuracies in percent by data set, method and rate, with a column for each seed."""
    cells = read_csv(path)
    if open_ := int((~cells["state"].isin(("finished", "failed"))).sum()):
        raise SystemExit(f"{path}: {open_} runs are not finished. Finish them: randlora-pl sweep one_rate")
    parts = cells["method"].str.rpartition(" at ")  # the column of rates has none of a run that failed
    cells = cells.assign(method=parts[0], learning_rate=parts[2].astype(float))
    return cells.pivot(index=["dataset", "method", "learning_rate"], columns="seed", values="accuracy")


def plateau(means: Series) -> list[float]:
    """Return the rates in a row around the best one whose means are within a point of it."""
    rates, near = list(means.index), (means >= means.max() - POINT).to_list()  # a rate without a mean is not near
    low = high = rates.index(means.idxmax())
    while low and near[low - 1]:
        low -= 1
    while high + 1 < len(rates) and near[high + 1]:
        high += 1
    return rates[low : high + 1]


def summary(runs: DataFrame) -> list[list[str]]:
    """Return a row of the table for each data set and method."""
    rows = []
    for (dataset, method), part in runs.groupby(level=[0, 1], sort=False):
        every = part.droplevel([0, 1]).sort_index()
        means, own = every.mean(axis=1, skipna=False), PAPER.get(str(method), 1e-3)
        if means.isna().all():
            rows.append([str(dataset), str(method), "failed", *[""] * 4, f"{means.index[0]:g}"])
            continue
        best, wide = float(means.idxmax()), plateau(means)
        at_own, lost = every.loc[own], every.loc[own] - every.loc[best]
        own_mean, loss = (
            "failed" if some.hasnans else shown(Estimate(tuple(some)), form)
            for some, form in ((at_own, ".1f"), (lost, "+.1f"))
        )
        broken = [rate for rate in means.index if rate > best and not means[rate] >= means[best] / 2]
        bound = "at least " if {wide[0], wide[-1]} & {means.index[0], means.index[-1]} else ""
        within = f"{bound}{wide[-1] / wide[0]:.3g} ({wide[0]:g} to {wide[-1]:g})"
        figures = [shown(Estimate(tuple(every.loc[best]))), f"{best:g}", within, f"{own_mean} ({own:g})", loss]
        fails = f"{broken[0]:g}" if broken else "none tried"
        rows.append([str(dataset), str(method), *figures, fails])
    return rows


def main() -> None:
    """Print the table and draw accuracy against rate, a panel for each data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Folder of the sweep's report.")
    folder = parser.parse_args().folder
    runs = curves(folder / "cells.csv")
    print(*markdown_table(HEADER, summary(runs), left=(0, 1)), sep="\n")
    datasets, methods = runs.index.unique(0), runs.index.unique(1)
    figure, color = new_figure(9, 3.6, "Accuracy against the learning rate"), colors(list(methods))
    panels = figure.subplots(1, len(datasets), squeeze=False)[0]
    for axes, dataset in zip(panels, datasets, strict=True):
        for method in methods:
            means = runs.loc[dataset, method].mean(axis=1, skipna=False)
            axes.plot(means.index, means, marker=".", label=method, color=color[method])
        axes.set(xscale="log", xlabel="learning rate", ylabel="test accuracy, %", title=dataset)
    panels[0].legend(fontsize=8)
    write_figure(figure, folder, "one_rate")


if __name__ == "__main__":
    main()
