"""Recompute from the paper's Tables 11 to 14, as data, what they can show about RandLoRA's gain over LoRA-32.

    python scripts/paper_tables.py

A gain is in points over LoRA-32 on the same dataset and budget. The gains of two methods share LoRA's noise, which
correlates them by itself. So the correlations of NoLA's and VeRA's gains are beside RandLoRA's. The accuracies of the
pretrained models are from another source (`zero_shot` in published.csv), which has other test images of some datasets
and lacks two datasets of ViT-L/14.
"""

from dataclasses import dataclass

import numpy as np
from pandas import DataFrame

from randlora_pl.lab.paper import AVERAGE, table
from randlora_pl.utils.text import markdown_table

BUDGETS = ("1-shot", "2-shot", "4-shot", "16-shot", "50%", "100%")
TABLES = (11, 12, 13, 14)
METHODS = ("RandLoRA", "NoLA", "VeRA")


@dataclass(frozen=True)
class Gains:
    """Gains over LoRA-32 of one table, with a row for each dataset.

    Attributes:
        below: Datasets on which LoRA-32 is below the pretrained model; None where its accuracies are not known.
    """

    model: str
    budget: str
    points: DataFrame
    below: int | None

    def mean(self, method: str) -> float:
        """Return the mean gain of a method in points."""
        return float(self.points[method].mean())

    @property
    def easy(self) -> DataFrame:
        """Datasets on which NoLA, whose update has rank 1, equals or beats LoRA-32."""
        return self.points[self.points["NoLA"] > -1e-9]

    @property
    def share(self) -> float | None:
        """Percent of RandLoRA's mean gain that comes from `easy`; None where the mean is not a gain."""
        total = float(self.points["RandLoRA"].sum())
        return 100 * float(self.easy["RandLoRA"].sum()) / total if total > 0 else None

    def correlation(self, method: str) -> float:
        """Return the correlation over datasets of a method's gain with the gain of full fine-tuning."""
        return float(np.corrcoef(self.points[method], self.points["FT"])[0, 1])


def gains(number: int, budget: str = "") -> Gains:
    """Return the gains of a table at one budget, or of all its cells."""
    cells = table(number)
    cells = cells[(cells["column"] != AVERAGE) & cells["budget"].isin([budget] if budget else BUDGETS)]
    names = cells["method"].str.replace(r"\d+$", "", regex=True)
    accuracies = cells.assign(method=names).pivot(index=["budget", "column"], columns="method", values="value")
    model = str(cells["model"].iloc[0])
    pretrained = table("zero_shot").query("model == @model").set_index("column")["value"]
    known = accuracies["LoRA"].reset_index("budget", drop=True)
    below = None if pretrained.empty else int((known < known.index.map(pretrained)).sum())
    return Gains(model, budget, accuracies.sub(accuracies["LoRA"], axis=0), below)


def row(one: Gains) -> list[str]:
    """Return the figures of a budget, or of all cells, as a row of the table."""
    share = "" if one.share is None else f"{one.share:.0f} % from {len(one.easy)} of {len(one.points)}"
    figures = [f"{one.mean('RandLoRA'):+.2f}", f"{one.mean('FT'):+.2f}", share]
    figures.append("" if one.below is None else str(one.below))
    return [one.model, one.budget or "all", *figures, *(f"{one.correlation(m):+.2f}" for m in METHODS)]


HEADER = ["Model", "Data", "RandLoRA's gain", "Full fine-tuning's gain", "Share where NoLA is not below LoRA-32"]
HEADER += ["LoRA-32 below pretrained", *(f"Correlation: {method}" for method in METHODS)]

if __name__ == "__main__":
    rows = [row(gains(number, budget)) for number in TABLES for budget in (*BUDGETS, "")]
    print("\n".join(markdown_table(HEADER, rows, range(2))))
