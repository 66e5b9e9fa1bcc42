import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from randlora_pl.language.glue import TASKS
from randlora_pl.language.glue_metrics import glue_scores, over_seeds

BITS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=30)


@pytest.mark.parametrize("name", ["sst2", "mrpc", "qnli", "rte"])
def test_accuracy(name: str) -> None:
    assert glue_scores(name, [0, 1, 1, 0], [0, 1, 0, 0]) == {"accuracy": 0.75}


@settings(max_examples=50, deadline=None)
@given(BITS)
def test_matthews_is_the_correlation_of_the_bits(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = (list(side) for side in zip(*pairs, strict=True))
    found = glue_scores("cola", predicted, labels)
    assert list(found) == ["matthews", "accuracy"]
    constant = len(set(predicted)) == 1 or len(set(labels)) == 1
    assert found["matthews"] == pytest.approx(0.0 if constant else np.corrcoef(predicted, labels)[0, 1])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=3, max_size=20))
def test_pearson_and_spearman(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = ([value / 10 for value in side] for side in zip(*pairs, strict=True))
    assume(len(set(predicted)) > 1 and len(set(labels)) > 1)
    ranks = [
        [sum(other < value for other in side) + (side.count(value) - 1) / 2 for value in side]
        for side in (predicted, labels)
    ]
    found = glue_scores("stsb", predicted, labels)
    assert found["pearson"] == pytest.approx(np.corrcoef(predicted, labels)[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found["combined"] == pytest.approx((found["pearson"] + found["spearman"]) / 2)


def test_a_constant_correlates_with_nothing() -> None:
    assert glue_scores("stsb", [2.0, 2.0], [1.0, 2.0]) == {"pearson": 0, "spearman": 0, "combined": 0}


def test_the_first_score_is_the_papers() -> None:
    for name, task in TASKS.items():
        assert next(iter(glue_scores(name, [0, 1], [0, 1]))) == task.metric


def test_the_deviation_is_the_populations() -> None:
    mean, deviation = over_seeds([90.0, 92.0, 94.0])
    assert mean == 92
    assert deviation == pytest.approx(math.sqrt(8 / 3))
