import csv
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_recall_fscore_support
from torch import Tensor
from torchmetrics.classification import MulticlassStatScores

from randlora_pl.run.callbacks import Figures, PerClass
from randlora_pl.run.callbacks.evaluation import class_table
from randlora_pl.run.callbacks.figures import (
    Prediction,
    Surest,
    confusion_figure,
    pixels,
    samples_figure,
    wrong_first,
)
from randlora_pl.run.callbacks.summary import format_metrics
from randlora_pl.tasks import AdaptationModule, LinearHeadTask, TextHeadTask
from randlora_pl.utils.text import unpack_bits
from tests.run.callbacks.conftest import Fit


def test_pictures_of_a_test_are_written(fit: Fit, tmp_path: Path) -> None:
    figures = Figures(samples=6)
    trainer, task, data = fit(figures)
    module = AdaptationModule(task)
    module.test_name = "zeroshot"
    trainer.test(module, data, verbose=False)
    assert not (tmp_path / "figures").exists(), "nothing is drawn before the training"
    module.test_name = "test"
    trainer.test(module, data, verbose=False)
    assert figures._counts is not None and int(figures._counts.sum()) == 128  # two batches of 64
    accuracy = float(figures._counts.diagonal().sum() / figures._counts.sum())
    assert abs(accuracy - float(trainer.callback_metrics["test/acc"])) < 1e-6
    assert len(figures._shown) == len({kept.label for _, kept in figures._shown}) == 6
    for name in ("confusion", "predictions", "mistakes"):
        assert np.asarray(Image.open(tmp_path / "figures" / f"{name}.png")).std() > 1
    header, *rows = csv.reader((tmp_path / "figures" / "confusion.csv").open(newline=""))
    assert header[1:] == [row[0] for row in rows] == task.classnames
    assert [[int(cell) for cell in row[1:]] for row in rows] == figures._counts.tolist()
    assert figures._surest.wrong == 128 - int(figures._counts.diagonal().sum())


def test_the_surest_mistakes_open_the_predictions(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(
        "randlora_pl.run.callbacks.figures.samples_figure",
        lambda images, truth, guesses, shares, heading="": drawn.append((truth, guesses, shares)),
    )
    trainer, task, data = fit(Figures(samples=4))
    trainer.test(AdaptationModule(task), data, verbose=False)
    predictions, mistakes = ([*zip(*grid, strict=True)] for grid in drawn)
    assert predictions[:2] == mistakes[:2] and len(predictions) == len(mistakes) == 4
    wrong = [true != guess for true, guess, _ in predictions]
    assert wrong == sorted(wrong, reverse=True)


def test_images_of_all_classes_are_shown_though_classes_come_one_by_one() -> None:
    figures, module = Figures(samples=6), AdaptationModule(TextHeadTask("tiny", "random"))
    figures.on_test_start(None, module)  # type: ignore[arg-type]
    for number in range(12):  # four batches of each class
        label, index = torch.full((5,), number // 4), torch.arange(5) + 5 * number
        images = index[:, None, None, None].expand(5, 3, 2, 2).float()
        outputs = {"logits": torch.eye(3)[label], "label": label, "index": index, "weight": torch.ones(5)}
        figures.on_test_batch_end(None, module, outputs, {"image": images}, number)  # type: ignore[arg-type]
    assert sorted(kept.label for _, kept in figures._shown) == [0, 0, 1, 1, 2, 2]
    assert all(kept.index == kept.image.mean() for _, kept in figures._shown)


def test_probabilities_are_the_predictions_of_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextHeadTask, "predictions", lambda self, outputs: outputs / 4)
    figures, module = Figures(samples=6), AdaptationModule(TextHeadTask("tiny", "random"))
    figures.on_test_start(None, module)  # type: ignore[arg-type]
    outputs = {"logits": torch.eye(3), "label": torch.tensor([1, 1, 1]), "index": torch.arange(3)}
    batch = {"image": torch.zeros(3, 3, 2, 2)}
    figures.on_test_batch_end(None, module, outputs | {"weight": torch.ones(3)}, batch, 0)  # type: ignore[arg-type]
    assert {kept.probability for _, kept in figures._shown} == {0.25}
    assert [mistake.probability for mistake in figures._surest.mistakes] == [0.25, 0.25]


def test_rows_of_the_confusion_matrix_are_true_classes() -> None:
    figure = confusion_figure(torch.tensor([[8, 2], [0, 0]]), ["a", "b"])
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.8, 0.2], [0, 0]])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true") and "fraction" in axes.get_title()
    assert sorted(text.get_text() for text in axes.texts) == ["2", "8"]
    assert pixels(figure).shape[2] == 3
    large = confusion_figure(torch.eye(150, dtype=torch.long), [str(n) for n in range(150)])
    assert not large.axes[0].texts


@pytest.mark.parametrize("name", [r"$\foo$", os.fsdecode(b"\xff"), "\x1b]0;a\x07"])
def test_any_class_name_can_be_drawn(name: str) -> None:
    assert pixels(confusion_figure(torch.eye(2, dtype=torch.long), [name, "b"])).std() > 1
    assert pixels(samples_figure(list(torch.rand(1, 3, 8, 8)), [name], [name], [0.9])).std() > 1


def test_a_figure_that_fails_does_not_end_the_run(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no font\nmore")

    monkeypatch.setattr("randlora_pl.run.callbacks.figures.confusion_figure", fail)
    monkeypatch.setattr(logging.getLogger("randlora_pl"), "propagate", True)
    trainer, task, data = fit(Figures(samples=1))
    trainer.test(AdaptationModule(task), data, verbose=False)
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    assert names == {"predictions.png", "mistakes.png", "confusion.csv"}
    assert "confusion could not be drawn: RuntimeError: no font" in caplog.text and "more" not in caplog.text


def test_wrong_predictions_stand_out() -> None:
    figure = samples_figure(list(torch.rand(3, 3, 8, 8)), ["a", "b", "c"], ["a", "c", "c"], [0.9, 0.5, 0.7])
    titles = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert titles == {"a 90%": "black", "c 50%\n(is b)": "firebrick", "c 70%": "black"}


def test_square_images_are_drawn_square() -> None:
    figure = samples_figure(list(torch.ones(5, 3, 8, 8)), ["a"] * 5, ["a"] * 5, [0.5] * 5)
    (axes,) = figure.axes
    (left, bottom), (right, top) = axes.transData.transform([(0, 0), (1, 1)])
    assert abs(right - left) == pytest.approx(abs(top - bottom), rel=1e-6)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_any_number_of_mistakes_is_drawn_without_overlap(count: int) -> None:
    names = ["the name of a class that never ends", "文" * 40, "two\nlines"]
    truth, guesses = ([names[(place + shift) % 3] for place in range(count)] for shift in (0, 1))
    figure = samples_figure([torch.rand(3, 8, 8)] * count, truth, guesses, [0.9] * count, "a heading")
    pixels(figure)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(box.overlaps(other) for place, box in enumerate(boxes) for other in boxes[:place])
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height for box in boxes)


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
    trainer = SimpleNamespace(loggers=[], global_step=0, is_global_zero=False)
    module = AdaptationModule(TextHeadTask("tiny", "random"))
    module.test_name = "x"
    callback.on_test_end(trainer, module)
    found = {name.removeprefix("x/"): value for name, value in callback.facts.items()}
    seen = [number for number in range(5) if number in truth]
    assert found["balanced_accuracy"] == pytest.approx(wanted[1][seen].mean())
    assert found["macro_f1"] == pytest.approx(f1_score(truth, guesses, average="macro", zero_division=0))
    if not absent:
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, guesses))


def test_table_is_written_after_the_training_alone(fit: Fit, tmp_path: Path) -> None:
    trainer, task, data = fit(callback := PerClass())
    module = AdaptationModule(task)
    module.test_name = "zeroshot"
    trainer.test(module, data, verbose=False)
    assert "zeroshot/macro_f1" in callback.facts and not (tmp_path / "test_per_class.csv").exists()
    module.test_name = "test"
    (figures,) = trainer.test(module, data, verbose=False)
    header, *rows = csv.reader((tmp_path / "test_per_class.csv").open(newline=""))
    assert header == ["class", "samples", "precision", "recall", "f1"] and [row[0] for row in rows] == task.classnames
    samples, recalls = (np.array([float(row[column]) for row in rows]) for column in (1, 3))
    assert samples.sum() == 128  # two batches of 64
    assert samples @ recalls / 128 == pytest.approx(figures["test/acc"], abs=1e-6)
    assert recalls.mean() == pytest.approx(callback.facts["test/balanced_accuracy"], abs=1e-6)
    right = unpack_bits(callback.facts["test/right"])
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
    task = LinearHeadTask("tiny")
    assert format_metrics(figures | {"test/largest_class": 19}, "test", task) == "accuracy 90.00 %"
    shown = format_metrics(figures | {"test/largest_class": 20}, "test", task)
    assert shown == "accuracy 90.00 %, balanced accuracy 60.00 %"


def predictions(samples: int = 40, classes: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(samples, 3, 4, 4, generator=generator)
    labels = torch.randint(classes, (samples,), generator=generator)
    logits = torch.randn(samples, classes, generator=generator).round()  # many are equally sure
    return images, torch.arange(samples), labels, logits.softmax(1), torch.rand(samples, generator=generator) > 0.2


def found(order: list[int], parts: int, most: int = 5) -> Surest:
    rows, surest = predictions(), Surest(most)
    for part in torch.tensor(order).tensor_split(parts):
        surest.add(*(column[part] for column in rows))
    return surest


@pytest.mark.parametrize("parts", [1, 3, 40])
def test_surest_mistakes_are_those_of_the_whole_set(parts: int) -> None:
    images, _, labels, shared, counts = predictions()
    shares, guesses = shared.max(1)
    wrong = [place for place in range(40) if counts[place] and guesses[place] != labels[place]]
    wanted = sorted(wrong, key=lambda place: (-float(shares[place]), place))[:5]
    surest = found(list(range(40)), parts)
    assert [mistake.index for mistake in surest.mistakes] == wanted
    assert (surest.wrong, surest.seen) == (len(wrong), int(counts.sum()))
    for mistake in surest.mistakes:
        assert (mistake.label, mistake.guess) == (labels[mistake.index], guesses[mistake.index])
        assert torch.equal(mistake.image, images[mistake.index])
        assert mistake.image.untyped_storage().nbytes() == mistake.image.nbytes, "a view keeps its whole batch"


def test_wrong_predictions_come_first_and_leave_room_for_right_ones() -> None:
    def one(index: int, probability: float, wrong: bool = False) -> Prediction:
        return Prediction(probability, index, 0, int(wrong), torch.zeros(3, 1, 1))

    samples = [one(9, 0.5), one(1, 0.9), one(7, 0.4, wrong=True), one(2, 0.8), one(5, 0.99)]
    mistakes = [one(index, 0.9 - 0.1 * index, wrong=True) for index in (0, 3, 4, 6)]
    assert [kept.index for kept in wrong_first(mistakes, samples)] == [0, 3, 4, 1, 9], "half of five, rounded up"
    assert [kept.index for kept in wrong_first(mistakes[:1], samples)] == [0, 7, 1, 2, 9]
    assert [kept.index for kept in wrong_first([samples[2]], samples)] == [7, 1, 2, 5, 9], "none twice"
    assert [kept.index for kept in wrong_first([], samples[:2])] == [1, 9]


def test_headings_count() -> None:
    surest = Surest(4)
    for wrong, words in ((0, "no mistake"), (1, "only"), (4, "all 4"), (1234, "4 most confident of 1,234")):
        surest.wrong = wrong
        assert words in surest.heading()
