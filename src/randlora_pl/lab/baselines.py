"""Plain classifiers next to the methods of a sweep: they show which tasks need no pretrained model."""

import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from randlora_pl.data import ImageData
from randlora_pl.data.base import PlannedData
from randlora_pl.lab.report.cells import BASELINES, MOST, SIDE, Baseline, read_baselines
from randlora_pl.language import LabelledTexts
from randlora_pl.language.metrics import grades
from randlora_pl.run.run_folder import acquire, lease_on
from randlora_pl.sweep.expand import data_of
from randlora_pl.sweep.plan import Cell
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import disk_errors, write_text

log = logging.getLogger("randlora_pl")


def measure(folder: Path, cells: Sequence[Cell]) -> None:
    """Measure the baselines of these cells that the folder does not have yet, unless another process does."""
    lease = lease_on(folder / "locks" / "baselines.lock")
    with disk_errors(folder, ""):
        if not acquire(lease):
            return
    try:
        known = read_baselines(folder, log.warning)
        done = {(one.dataset, one.budget, one.seed) for one in known}
        failed: set[tuple[str, str]] = set()
        for cell in measured_with(cells):
            _, dataset, budget, _, seed = cell.labels
            if (dataset, budget, seed) in done or (dataset, budget) in failed:
                continue
            try:
                rows = [Baseline(dataset, budget, seed, *row) for row in baselines_of(cell)]
            except (UserError, OSError, ValueError) as error:
                log.warning("no baselines for %s: %s", dataset, error)
                failed.add((dataset, budget))
                continue
            known += rows
            for row in rows:
                log.info("%s, %s, seed %s: %s %.1f %%", dataset, budget, seed, row.name, 100 * row.score)
            with disk_errors(folder, ""):
                lines = ",\n".join(json.dumps(asdict(one)) for one in known)
                write_text(folder / BASELINES, f"[\n{lines}\n]\n")
    finally:
        lease.release()


def measured_with(cells: Iterable[Cell]) -> list[Cell]:
    """Return a cell for each dataset, budget and seed; all training samples are the same for every seed, so for one."""
    by_data: dict[tuple[str, str], dict[int, Cell]] = {}
    for cell in cells:
        if not cell.untrained:
            by_data.setdefault((cell.labels.dataset, cell.labels.budget), {}).setdefault(cell.labels.seed, cell)
    return [
        by_seed[seed]
        for (_, budget), by_seed in by_data.items()
        for seed in sorted(by_seed)[: 1 if budget == "100%" else None]
    ]


def baselines_of(cell: Cell) -> Iterator[tuple[str, float, int, int]]:
    """Yield name, score, training samples and how many there are, for the data of a cell."""
    data = data_of({**cell.tree, "data": cell.tree["data"] | {"seed": cell.labels.seed}})
    limit = cell.tree.get("trainer", {}).get("limit_test_batches")
    tests = limit * data.eval_batch_size if isinstance(limit, int) and limit > 0 else None
    return of_texts(data, tests) if isinstance(data, LabelledTexts) else of_images(data, tests)


def of_images(data: PlannedData, tests: int | None = None) -> Iterator[tuple[str, float, int, int]]:
    """Yield the accuracies of logistic regression and of the nearest neighbor on raw pixels.

    Args:
        data: An `ImageData`; other data have none.
        tests: Largest number of test images, the first ones.
    """
    from sklearn import linear_model, neighbors, pipeline, preprocessing

    if not isinstance(data, ImageData):
        return
    data.setup()
    images, labels = {}, {}
    for split in ("train", "test"):
        samples = data.samples(split)
        rows, labels[split] = np.asarray(samples.rows), np.asarray(samples.labels)
        first = _small(samples.images.load(int(rows[0])))
        keep = _drawn(len(rows), first.size, data.seed) if split == "train" else np.arange(len(rows))[:tests]
        images[split] = [_small(samples.images.load(row)) for row in rows[keep].tolist()]
        labels[split] = labels[split][keep]
    if len({image.shape for some in images.values() for image in some}) > 1:
        images = {split: [_square(image) for image in some] for split, some in images.items()}
    pixels = {split: np.stack(some).reshape(len(some), -1).astype(np.float64) for split, some in images.items()}
    keep, whole = _drawn(*pixels["train"].shape, data.seed), len(data.samples("train").rows)
    train = pixels["train"][keep], labels["train"][keep]
    logistic = pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=2000))
    nearest = neighbors.KNeighborsClassifier(1)
    for name, model in (("logistic regression", logistic), ("1-nearest neighbor", nearest)):
        score = _fitted(model, *train).score(pixels["test"], labels["test"])
        yield f"{name} (raw pixels)", float(score), len(train[0]), whole


def of_texts(data: LabelledTexts, tests: int | None = None) -> Iterator[tuple[str, float, int, int]]:
    """Yield the scores of a constant answer, and of logistic or ridge regression on the words.

    Args:
        data: The texts.
        tests: Largest number of test texts, the first ones.

    Raises:
        UserError: The test texts are missing.
    """
    from sklearn import dummy, linear_model, pipeline
    from sklearn.feature_extraction.text import TfidfVectorizer

    splits = data.examples()
    if "test" not in splits:
        files = f"train.{data.dataset} and test.{data.dataset}"
        raise UserError(f"{data.root} has no test texts. Set data.root to a folder with {files}.")
    texts = {split: [" ".join(parts) for parts in splits[split].sentences] for split in ("train", "test")}
    if data.scores:
        names = "mean score", "ridge regression (words)"
        constant, regression = dummy.DummyRegressor(), linear_model.Ridge()
    else:
        names = "largest class", "logistic regression (words)"
        constant, regression = dummy.DummyClassifier(), linear_model.LogisticRegression(max_iter=2000)
    labels, count = splits["train"].labels, len(texts["train"])
    on_words = pipeline.make_pipeline(TfidfVectorizer(), regression)
    for name, model in zip(names, (constant, on_words), strict=True):
        predicted = _fitted(model, texts["train"], labels).predict(texts["test"][:tests])
        yield name, grades(data.metric, predicted.tolist(), splits["test"].labels[:tests])[data.metric], count, count


def _drawn(count: int, size: int, seed: int) -> Any:
    """Return the numbers of as many images as have at most `MOST` values; drawn in random order if that is not all."""
    most = max(1, MOST // size)
    return np.arange(count) if count <= most else np.random.default_rng(seed).permutation(count)[:most]


def _fitted(model: Any, samples: Any, labels: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged
        return model.fit(samples, labels)


def _small(image: Any) -> Any:
    return image if max(image.shape[:2]) <= SIDE else _square(image)


def _square(image: Any) -> Any:
    from PIL import Image

    whole = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert("RGB")
    return np.asarray(whole.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
