import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_recall_fscore_support
from torchmetrics.classification import MulticlassStatScores

from randlora_pl.run.callbacks import PerClass
from randlora_pl.run.callbacks.figures import class_table
from randlora_pl.run.fit_results import format_metrics
from randlora_pl.utils.text import unpacked
from tests.run.callbacks.conftest import Fit


@pytest.mark.parametrize("absent", [False, True])
def test_metrics_are_those_of_sklearn(absent: bool) -> None:
    generator = np.random.default_rng(0)
    truth, guesses = generator.integers(0, 4, 60), generator.integers(0, 4, 60)
    truth[truth == 3] = 2 if absent else 3  # a class without samples that is predicted nevertheless
    scores = MulticlassStatScores(5, average=None)  # and one that does not occur at all
    table = class_table(scores(torch.from_numpy(guesses), torch.from_numpy(truth)))
    wanted = precision_recall_fscore_support(truth, guesses, labels=range(5), zero_division=np.nan)
    np.testing.assert_array_equal(table[:, 0], wanted[3])
    for column, values in enumerate(wanted[:3], 1):
        np.testing.assert_allclose(table[:, column], values)
    callback = PerClass()
    callback.on_test_start(None, None)
    callback._scores = scores
    callback._right.update(torch.tensor([1]))
    trainer, task = SimpleNamespace(loggers=[], global_step=0, is_global_zero=False), SimpleNamespace(test_name="x")
    callback.on_test_end(trainer, task)
    found = {name.removeprefix("x/"): value for name, value in callback.facts.items()}
    seen = [number for number in range(5) if number in truth]
    assert found["balanced_accuracy"] == pytest.approx(wanted[1][seen].mean())
    assert found["macro_f1"] == pytest.approx(f1_score(truth, guesses, average="macro", zero_division=0))
    if not absent:
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, guesses))


def test_table_is_written_after_the_training_alone(fit: Fit, tmp_path: Path) -> None:
    trainer, task, data = fit(callback := PerClass())
    task.test_name = "zeroshot"
    trainer.test(task, data, verbose=False)
    assert "zeroshot/macro_f1" in callback.facts and not (tmp_path / "test_per_class.csv").exists()
    task.test_name = "test"
    (figures,) = trainer.test(task, data, verbose=False)
    header, *rows = csv.reader((tmp_path / "test_per_class.csv").open(newline=""))
    assert header == ["class", "samples", "precision", "recall", "f1"] and [row[0] for row in rows] == task.classnames
    samples, recalls = (np.array([float(row[column]) for row in rows]) for column in (1, 3))
    assert samples.sum() == 128  # two batches of 64
    assert samples @ recalls / 128 == pytest.approx(figures["test/acc"], abs=1e-6)
    assert recalls.mean() == pytest.approx(callback.facts["test/balanced_accuracy"], abs=1e-6)
    right = unpacked(callback.facts["test/right"])
    assert right is not None and len(right) == 128 and right.mean() == pytest.approx(figures["test/acc"], abs=1e-6)
    with torch.no_grad():
        batches = list(data.test_dataloader())
        task.prepare_evaluation()
        guesses = torch.cat([task.class_logits(batch["image"]).argmax(1) for batch in batches])
        task.finish_evaluation()
    index, labels = (torch.cat([batch[name] for batch in batches]) for name in ("index", "label"))
    np.testing.assert_array_equal(right, (guesses == labels)[index.argsort()].numpy()[: len(right)])


def test_balanced_accuracy_is_shown_where_classes_are_unequal() -> None:
    figures = {"test/acc": 0.9, "test/balanced_accuracy": 0.6, "test/macro_f1": 0.5, "test/smallest_class": 10}
    assert format_metrics(figures | {"test/largest_class": 19}, "test") == "accuracy 90.00 %"
    shown = format_metrics(figures | {"test/largest_class": 20}, "test")
    assert shown == "accuracy 90.00 %, balanced accuracy 60.00 %"
