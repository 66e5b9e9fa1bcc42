"""Plain classifiers of pixels and words, and the shipped sweeps of both."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from randlora_pl.commands.sweep_job import find_sweep
from randlora_pl.data import ImageData
from randlora_pl.lab import baselines
from randlora_pl.lab.baselines import of_images, of_texts
from randlora_pl.lab.report.collect import read_sweep
from randlora_pl.lab.report.files import write_report
from randlora_pl.language import LabelledTexts
from randlora_pl.sweep.expand import task_of
from randlora_pl.sweep.folder import SweepFolder
from randlora_pl.sweep.plan import plan
from randlora_pl.sweep.search import Search
from randlora_pl.tasks import ImageTask
from randlora_pl.utils.errors import UserError
from tests.lab.report.sweeps import description, write_sweep
from tests.sweep.grids import cells_of


def few(**options: object) -> ImageData:
    return ImageData(**{"dataset": "digits", "shots": 2, "batch_size": 8, "seed": 1} | options)  # type: ignore[arg-type]


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    data = few()
    data.setup()
    samples = data.samples(split)
    images = [samples.images.load(int(row)).reshape(-1).astype(float) for row in samples.rows]
    return np.stack(images), np.asarray(samples.labels)


def test_baselines_see_the_images_of_their_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = (list(of_images(few(seed=seed))) for seed in (1, 1, 2))
    assert [name for name, *_ in first] == ["logistic regression (raw pixels)", "1-nearest neighbor (raw pixels)"]
    assert all(0.3 < accuracy < 0.9 and counts == [20, 20] for _, accuracy, *counts in first)
    assert first == again != other
    images, labels = digits("train")
    tests, answers = digits("test")
    nearest = [labels[((images - image) ** 2).sum(1).argmin()] for image in tests[:30]]
    right = np.mean(np.asarray(nearest) == answers[:30])
    assert [score for _, score, *_ in of_images(few(), tests=30)][1] == pytest.approx(right)
    monkeypatch.setattr(baselines, "MOST", 12 * 64)
    drawn, again, other = (list(of_images(few(seed=seed))) for seed in (1, 1, 2))
    assert drawn == again != other and all(counts == [12, 20] for _, _, *counts in drawn)


def test_large_images_and_those_of_several_sizes_are_resized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    for label, color in (("a", "red"), ("b", "blue")):
        (tmp_path / label).mkdir()
        for number in range(12):
            Image.new("RGB", (4 + 20 * number, 4), color).save(tmp_path / label / f"{number}.png")
    found = list(of_images(few(dataset="folder", root=str(tmp_path))))
    assert [score for _, score, *_ in found] == [1, 1]
    monkeypatch.setattr(baselines, "MOST", 3 * 32 * 32 * 3)  # more than all training images before they are resized
    each = (of_images(few(dataset="folder", root=str(tmp_path), seed=seed)) for seed in range(4))
    sizes = [counts for found in each for _, _, *counts in found]
    assert sizes == [[3, 4]] * 8, "never of one class alone, which logistic regression refuses"


@pytest.mark.parametrize("scores", [False, True])
def test_baselines_of_texts(tmp_path: Path, scores: bool) -> None:
    words = ["bad", "poor", "good", "fine"]
    labels = ["0.0", "0.2", "0.8", "1.0"] if scores else ["no", "no", "yes", "yes"]
    rows = [f"a {word} film,{label}" for word, label in zip(words, labels, strict=True)]
    for split, count in (("train", 9), ("test", 3)):
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,label", *rows * count]) + "\n")
    found = list(of_texts(LabelledTexts(dataset="csv", root=str(tmp_path), scores=scores)))
    names = ["mean score", "ridge regression (words)"] if scores else ["largest class", "logistic regression (words)"]
    assert [name for name, *_ in found] == names and all(counts == [36, 36] for _, _, *counts in found)
    assert found[0][1] == (0 if scores else 0.5) and found[1][1] > 0.95


def test_texts_without_a_test_are_named(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_text("text,label\na bad film,no\na good film,yes\n")
    for root in (tmp_path, file):
        with pytest.raises(UserError, match="has no test texts") as error:
            list(of_texts(LabelledTexts(dataset="csv", root=str(root))))
        assert str(error.value).startswith(str(root))


def test_a_sweep_measures_them_once_and_its_report_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cells = cells_of(seeds=[1, 2], budgets=[2, "100%"])
    baselines.measure(tmp_path, cells)
    rows = json.loads((tmp_path / "baselines.json").read_text())
    places = [(row["budget"], row["seed"]) for row in rows]
    assert places == [place for place in [("2-shot", 1), ("2-shot", 2), ("100%", 1)] for _ in range(2)]
    monkeypatch.setattr(baselines, "of_images", None)  # it is not called again
    baselines.measure(tmp_path, cells)
    assert json.loads((tmp_path / "baselines.json").read_text()) == rows
    monkeypatch.undo()
    nowhere = {"digits": {"dataset": "folder", "root": str(tmp_path / "x")}}
    baselines.measure(tmp_path, cells_of(datasets=nowhere, seeds=[3]))
    assert "no baselines for digits" in caplog.text

    content = description(models={"tiny": {}}, datasets=["digits"], budgets=[2], seeds=[1], paper=None)
    folder = write_sweep(tmp_path / "sweep", content)
    rows[1] |= {"train": 10}
    (folder / "baselines.json").write_text(json.dumps(rows))
    monkeypatch.setattr("randlora_pl.lab.report.files.draw", lambda *_: b"<svg></svg>")  # no figure has them
    write_report(read_sweep(folder), tmp_path / "report")
    write_report(read_sweep(tmp_path / "report"), tmp_path / "again")
    text = (tmp_path / "report" / "report.md").read_text()
    assert (tmp_path / "again" / "baselines.json").read_text() == json.dumps(rows)
    for report in (text, (tmp_path / "again" / "report.md").read_text()):
        line = report.partition("\n| 1-nearest neighbor (raw pixels) | 2-shot")[2].partition("\n")[0]
        assert "<br>10 of 20 samples" in line and "No test of pairs has them." in report
    for content in ([{}], 5, ["x"], [[]], [""], [rows[0] | {"dataset": ["digits"]}], [rows[0] | {"train": "10"}]):
        (folder / "baselines.json").write_text(json.dumps(content))
        assert "baselines.json is cut off or damaged" in read_sweep(folder).warnings[0]
    for name in ("baselines.json", "sweep.yaml"):
        (folder / name).unlink()
    write_report(read_sweep(folder), tmp_path / "report", overwrite=True)
    assert not {"baselines.json", "sweep.yaml"} & {path.name for path in (tmp_path / "report").iterdir()}


def test_the_shipped_sweep_has_every_method_of_the_papers_vision_experiments() -> None:
    _, description = find_sweep("compare_methods")
    trained = [cell for cell in plan(description) if not cell.untrained]
    assert {cell.flat["model.adapter"].rpartition(".")[2] for cell in trained} == {
        "RandLoRA", "LoRA", "DoRA", "VeRA", "NoLA", "BitFit", "LinearProbe", "FullFineTuning",
    }  # fmt: skip
    assert {cell.flat["data.shots"] for cell in trained} == {16}
    assert not {0, *description.tune["seeds"]} & set(description.seeds), "seed 0 is kept for choosing learning rates"


def test_the_evidence_is_eight_datasets_with_five_seeds_and_some_of_them_are_searched() -> None:
    for name, methods, searched in (
        ("evidence", 19, {"mnist_5k", "fashion_mnist_unseen", "emoji_groups"}),
        ("evidence_texts", 12, {"films", "tweets scores"}),
    ):
        _, description = find_sweep(name)
        cells = plan(replace(description, seeds=description.seeds[:1]))
        trained = [cell for cell in cells if not cell.untrained]
        assert len(trained) == 8 * methods and len({cell.hash for cell in cells}) == len(cells)
        assert len(description.seeds) == 5
        search = Search(description, SweepFolder(Path("nowhere")))
        search.restrict("methods", ["LoRA"])
        assert len(search.known()) == 3 * len(searched)
        if rates := search.space["learning_rate"]:  # by default, the search itself goes by factors of two
            assert all(second / first == 2 for first, second in pairwise(rates)) and rates[-1] > 1
        assert {cell.labels.dataset for cell in search.known()} == searched
        assert len(description.pairs) <= 6, "with eight datasets more pairs can have no verdict: 7 * 2 / 2**8 > 0.05"
    assert sum(bool(cell.flat.get("data.scores")) for cell in cells) == len(cells) // 2


@pytest.mark.parametrize("name", ["compare_bases", "compare_bases_fashion"])
def test_bases_are_compared_over_five_seeds_at_one_rate(name: str) -> None:
    _, description = find_sweep(name)
    tasks = [task_of(cell.tree) for cell in plan(description) if cell.labels.seed == 1]
    assert all(isinstance(task, ImageTask) and task.learning_rate == 1e-3 for task in tasks)
    assert [task.adapter.options()["basis"] for task in tasks if task] == ["uniform", "hadamard"]
    assert len(description.seeds) == 5
