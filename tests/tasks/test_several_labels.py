"""Several labels of an image: losses, metrics and answers against slow and outside references."""

import math

import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from randlora_pl.tasks.losses import set_losses
from randlora_pl.tasks.measures import class_answers, set_metrics


def test_losses_are_the_binary_cross_entropy_of_each_class() -> None:
    logits, target = torch.randn(3, 4), (torch.rand(3, 4) < 0.5).float()
    for smoothing in (0.0, 0.2):
        losses = set_losses(logits, target, smoothing)
        for row in range(3):
            slow = 0.0
            for one in range(4):
                yes = 1 / (1 + math.exp(-float(logits[row, one])))
                wanted = (1 - smoothing) * float(target[row, one]) + smoothing / 2
                slow -= (wanted * math.log(yes) + (1 - wanted) * math.log(1 - yes)) / 4
            assert float(losses[row]) == pytest.approx(slow, rel=1e-5)


def test_metrics_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, truth = torch.rand(50, 5, generator=generator), (torch.rand(50, 5, generator=generator) < 0.3).long()
    truth[:, 4] = 0  # no image has it
    metrics = set_metrics(5)
    for part in (slice(0, 20), slice(20, 50)):
        for metric in metrics.values():
            metric.update(scores[part], truth[part])
    assert float(metrics["map"].compute()) == pytest.approx(
        average_precision_score(truth[:, :4], scores[:, :4], average="macro"), abs=1e-6
    )
    expected = f1_score(truth, scores > 0.5, average="macro", zero_division=0)
    assert float(metrics["f1"].compute()) == pytest.approx(expected, abs=1e-6)


def test_answers_name_all_above_a_half_and_the_best() -> None:
    answers = class_answers(torch.tensor([[0.6, 0.51, 0.5], [0.2, 0.3, 0.4]]), ["a", "b", "c"], 2, several=True)
    assert answers.columns == ["labels", "class", "probability", "class_2", "probability_2"]
    assert answers.rows[0] == ["a;b", "a", "0.600000", "b", "0.510000"] and answers.rows[1][:2] == ["", "c"]
