"""What GLUE's predictions are scored by, and mean and deviation over seeds (paper: appendix B.1, Table 4)."""

import statistics
from collections.abc import Sequence

from randlora_pl.language.glue import TASKS


def glue_scores(name: str, predicted: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """The scores of one task's predictions.

    Args:
        name: The task.
        predicted: Class numbers, or scores of STS-B.
        labels: The right ones.

    Returns:
        ``accuracy`` in 0..1 (SST-2, MRPC, QNLI, RTE); ``matthews`` in -1..1 and ``accuracy`` (CoLA); ``pearson``,
        ``spearman`` and ``combined``, their mean, which the released scripts report though the paper names Pearson's
        (STS-B). The first is the one that the paper reports. A correlation with a constant is 0.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    metric = TASKS[name].metric
    if metric == "pearson":
        if len(set(predicted)) == 1 or len(set(labels)) == 1:
            return {"pearson": 0.0, "spearman": 0.0, "combined": 0.0}
        pearson, spearman = float(pearsonr(predicted, labels)[0]), float(spearmanr(predicted, labels)[0])
        return {"pearson": pearson, "spearman": spearman, "combined": (pearson + spearman) / 2}
    accuracy = {"accuracy": float(accuracy_score(labels, predicted))}
    if metric == "matthews":
        return {"matthews": float(matthews_corrcoef(labels, predicted)), **accuracy}
    return accuracy


def over_seeds(scores: Sequence[float]) -> tuple[float, float]:
    """Mean and deviation as the paper gives them: the deviation is the population's (divided by n, not n - 1)."""
    return statistics.fmean(scores), statistics.pstdev(scores)
