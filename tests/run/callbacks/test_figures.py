import csv
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from randlora_pl.run.callbacks import Figures
from randlora_pl.run.callbacks.figures import confusion_figure, pixels, samples_figure
from tests.run.callbacks.conftest import Fit


def test_pictures_of_a_test_are_written(fit: Fit, tmp_path: Path) -> None:
    figures = Figures(samples=6)
    trainer, task, data = fit(figures)
    trainer.test(task, data, verbose=False)
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
    trainer.test(task, data, verbose=False)
    predictions, mistakes = ([*zip(*grid, strict=True)] for grid in drawn)
    assert predictions[:2] == mistakes[:2] and len(predictions) == len(mistakes) == 4
    wrong = [true != guess for true, guess, _ in predictions]
    assert wrong == sorted(wrong, reverse=True)


def test_images_of_all_classes_are_shown_though_classes_come_one_by_one() -> None:
    figures, task = Figures(samples=6), SimpleNamespace(test_name="test")
    figures.on_test_start(None, task)  # type: ignore[arg-type]
    for number in range(12):  # four batches of each class
        label, index = torch.full((5,), number // 4), torch.arange(5) + 5 * number
        images = index[:, None, None, None].expand(5, 3, 2, 2).float()
        outputs = {"logits": torch.eye(3)[label], "label": label, "index": index, "weight": torch.ones(5)}
        figures.on_test_batch_end(None, task, outputs, {"image": images}, number)  # type: ignore[arg-type]
    assert sorted(kept.label for _, kept in figures._shown) == [0, 0, 1, 1, 2, 2]
    assert all(kept.index == kept.image.mean() for _, kept in figures._shown)


def test_nothing_is_drawn_before_the_training(fit: Fit, tmp_path: Path) -> None:
    trainer, task, data = fit(Figures())
    task.test_name = "zeroshot"
    trainer.test(task, data, verbose=False)
    assert not (tmp_path / "figures").exists()


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
    trainer.test(task, data, verbose=False)
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
