import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from randlora_pl.language.glue import TASKS
from randlora_pl.language.metrics import PredictionCollector, grades

BITS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=30)


def test_accuracy_and_f1() -> None:
    found = grades("acc", [0, 1, 1, 0], [0, 1, 0, 0])
    assert found == {"acc": 0.75, "f1": pytest.approx(2 / 3), "matthews": pytest.approx(1 / math.sqrt(3))}
    three = grades("acc", [0, 1, 2, 2], [0, 1, 2, 1])
    assert three["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)  # the mean over the classes


@settings(max_examples=50)
@given(BITS)
def test_matthews_is_the_correlation_of_the_bits(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = (list(side) for side in zip(*pairs, strict=True))
    found = grades("matthews", predicted, labels)
    assert next(iter(found)) == "matthews"
    constant = len(set(predicted)) == 1 or len(set(labels)) == 1
    assert found["matthews"] == pytest.approx(0.0 if constant else np.corrcoef(predicted, labels)[0, 1])


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=3, max_size=20))
def test_pearson_and_spearman(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = ([value / 10 for value in side] for side in zip(*pairs, strict=True))
    assume(len(set(predicted)) > 1 and len(set(labels)) > 1)
    ranks = [
        [sum(other < value for other in side) + (side.count(value) - 1) / 2 for value in side]
        for side in (predicted, labels)
    ]
    found = grades("pearson", predicted, labels)
    assert found["pearson"] == pytest.approx(np.corrcoef(predicted, labels)[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found["combined"] == pytest.approx((found["pearson"] + found["spearman"]) / 2)


def test_a_constant_correlates_with_nothing() -> None:
    assert grades("pearson", [2.0, 2.0], [1.0, 2.0]) == {"pearson": 0, "spearman": 0, "combined": 0}


def test_the_first_score_is_the_papers() -> None:
    for name, task in TASKS.items():
        assert next(iter(grades(task.metric, [0, 1], [0, 1]))) == task.metric, name


def test_predictions_are_gathered_whole() -> None:
    """Batches of any size, also of none, as where a device only pads."""
    metric = PredictionCollector()
    for size, start in ((3, 0), (0, 3), (1, 3)):
        values = torch.arange(start, start + size)
        metric.update(values, values + 1, values.float())
    assert metric.compute() == {"predicted": [0, 1, 2, 3], "labels": [1, 2, 3, 4], "loss": 1.5}
