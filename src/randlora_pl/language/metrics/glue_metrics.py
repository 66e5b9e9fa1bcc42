"""Metrics of predicted classes and scores (appendix B.1, Table 4)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from randlora_pl.language.datasets import glue


def grades(metric: glue.Metric, predicted: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Return the metrics of predicted class numbers or scores; the selected one, which the paper reports, is the first.

    Returns:
        For classes ``acc`` in 0..1, ``matthews`` in -1..1 and ``f1`` in 0..1, of class 1 if there are two, otherwise
        the mean over the classes. For scores ``pearson``, ``spearman`` and ``combined``, their mean, which the released
        scripts report though the paper names Pearson's. A correlation with a constant is 0.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if metric == "pearson":
        if len(set(predicted)) == 1 or len(set(labels)) == 1:
            return {"pearson": 0.0, "spearman": 0.0, "combined": 0.0}
        pearson, spearman = float(pearsonr(predicted, labels)[0]), float(spearmanr(predicted, labels)[0])
        return {"pearson": pearson, "spearman": spearman, "combined": (pearson + spearman) / 2}
    seen = {*predicted, *labels}
    average = "binary" if seen <= {0, 1} else "macro"
    found = {
        "acc": float(accuracy_score(labels, predicted)),
        "matthews": float(matthews_corrcoef(labels, predicted)) if len(seen) > 1 else 0.0,  # which would warn
        "f1": float(f1_score(labels, predicted, average=average, zero_division=0.0)),
    }
    return {metric: found[metric], **found}


class PredictionCollector(Metric):
    """All predictions of an evaluation, gathered from all devices: a mean over batches would be no correlation."""

    full_state_update = False
    predicted: list[Tensor]
    labels: list[Tensor]
    losses: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("predicted", "labels", "losses"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, predicted: Tensor, labels: Tensor, losses: Tensor) -> None:
        """Add the predictions of one batch, all (b,); b may be 0 if a device only pads."""
        for held, values in zip((self.predicted, self.labels, self.losses), (predicted, labels, losses), strict=True):
            held.append(values.detach())

    def compute(self) -> dict[str, Any]:
        """Return the whole set's ``predicted`` and ``labels`` as lists, and its mean ``loss``."""
        predicted, labels, losses = (dim_zero_cat(held).cpu() for held in (self.predicted, self.labels, self.losses))
        return {
            "predicted": predicted.tolist(),
            "labels": labels.tolist(),
            "loss": float(losses.to(torch.float64).mean()),
        }
