"""The verdict on the evidence has the tables of its reports, and each decimal of its sentences is in one of them."""

import csv
import re
from collections.abc import Iterator
from statistics import fmean

from randlora_pl.lab.report.statistics import Estimate, formatted
from tests.docs.pages import DOCS, PAGES, RESULTS, prose_of
from tests.docs.test_numbers import rows_of

FOLDER = DOCS / "results" / "evidence"
NAMES = [name for name in RESULTS if name.startswith("evidence")]
KINDS = {"evidence": "images", "evidence_texts": "texts"}
SIZES = {
    "evidence": (
        ("RandLoRA-48 (a sixth)", "LoRA (a sixth)"),
        ("RandLoRA-6", "LoRA"),
        ("RandLoRA-3 (twice)", "LoRA (twice)"),
    ),
    "evidence_texts": (("RandLoRA-43", "LoRA-3"), ("RandLoRA-6", "LoRA"), ("RandLoRA-3", "LoRA-40")),
}
"""RandLoRA and LoRA of each number of parameters, by sweep."""


def report_of(name: str) -> str:
    return (DOCS / "results" / name / "report.md").read_text(encoding="utf-8")


def table_of(name: str, header: str) -> dict[str, list[str]]:
    """Rows of the first table whose header matches, by method; of each cell the first line."""
    for part in report_of(name).split("\n\n"):
        if re.match(header, part):
            rows = rows_of(part, part[:9])[1:]
            return {row[0]: [cell.partition("<br>")[0] for cell in row[1:]] for row in rows}
    raise AssertionError(f"{name} has no table {header}")


def cells_of(name: str) -> list[dict[str, str]]:
    with (DOCS / "results" / name / "cells.csv").open(encoding="utf-8", newline="") as file:
        return [cell for cell in csv.DictReader(file) if cell["state"] == "finished"]


def pairs(name: str) -> Iterator[list[str]]:
    """The planned pairs: difference in points, adjusted p, verdict."""
    for row in rows_of(report_of(name), "| Method | against | Model | Verdict | Parameter ratio")[1:]:
        if row[3] != "not planned":
            yield [row[0], row[1], row[4].split()[0], row[5], row[8], row[3]]


def methods(name: str) -> Iterator[list[str]]:
    """Each trained method: size, rank, score, loss at the end, steps to LoRA's loss, time of a run, seen clothes."""
    averages = table_of(name, r"\| Method \| Trained parameters \| (zero-shot<br>|100%<br>)")
    losses = table_of(name, r"\| Method \| Reference \| Steps to its loss")
    times = table_of(name, r"\| Method \| Device \| Trained parameters \| Training time")
    kept = table_of(name, r"\| Method \| fashion\\_mnist\\_seen") if name == "evidence" else {}
    ranks: dict[str, list[float]] = {}
    for cell in cells_of(name):
        if cell["spectrum/rank"]:
            ranks.setdefault(cell["method"], []).append(float(cell["spectrum/rank"]))
    for method, (count, *_, mean) in averages.items():
        if method == "zero-shot":
            continue
        loss = losses.get(method, ["-"] * 9)
        rank = f"{fmean(ranks[method]):.0f}" if method in ranks else "-"
        elsewhere = [kept.get(method, ["-"])[0]] if kept else []
        yield [method, count, rank, mean, loss[8] or "-", loss[1], times[method][2], *elsewhere]


def datasets(name: str) -> Iterator[list[str]]:
    """Each dataset: the plain classifiers, the model before training, full fine-tuning, and RandLoRA minus LoRA."""
    report = report_of(name)
    header, *rows = rows_of(report, "| Method | Data | Trained parameters |")
    shown = {row[0]: dict(zip(header, (cell.partition("<br>")[0] for cell in row), strict=True)) for row in rows}
    plain = [method for method in shown if not any(cell["method"] == method for cell in cells_of(name))]
    scores = {(cell["method"], cell["dataset"], cell["seed"]): float(cell["accuracy"]) for cell in cells_of(name)}
    for column in header[3:-1]:
        dataset = column.partition("<br>")[0].replace("\\", "")
        seeds = sorted({seed for _, where, seed in scores if where == dataset})
        before = [shown["zero-shot"][column]] if "zero-shot" in shown else []
        differences = []
        for one, other in SIZES[name]:
            values = Estimate(tuple(scores[one, dataset, seed] - scores[other, dataset, seed] for seed in seeds))
            differences.append(f"{formatted(values.mean)} ± {values.half:.1f}")
        own = [shown[one][column] for one in plain if shown[one][column]]  # classes and scores have different ones
        yield [column.partition("<br>")[0], *own, *before, shown["full fine-tuning"][column], *differences]


def together(name: str) -> Iterator[list[str]]:
    """LoRA and RandLoRA, jointly and in two stages, against each alone with as many parameters."""
    rows = rows_of(report_of(name), "| Method | against | Model | Verdict | Parameter ratio")[1:]
    found = {(row[0], row[1]): row[5] for row in rows}
    equal, twice = ("LoRA", "RandLoRA-6"), ("LoRA (twice)", "RandLoRA-3 (twice)")
    for method, others in (
        ("LoRA + RandLoRA", equal),
        ("LoRA, then RandLoRA (absorbed)", equal),
        ("LoRA, then RandLoRA (beside)", twice),
    ):
        for other in others:
            yield [method, other, found.get((method, other)) or turned(found[other, method])]


def turned(difference: str) -> str:
    """A difference of the second to the first: ``-0.30 ± 0.42`` for ``+0.30 ± 0.42``."""
    return difference.translate(str.maketrans("+-", "-+"))


def correlations(name: str) -> Iterator[list[str]]:
    """Rank, effective rank and stable rank against accuracy over the methods of a dataset."""
    for row in rows_of(report_of(name), "| Metric of the update | Model | Correlation at equal")[1:]:
        yield [row[0], row[2], row[3]]


def family() -> Iterator[list[str]]:
    """Validation loss minus RandLoRA-6's: mean and standard error of the paired seeds, and how many tasks it lowers."""
    with (FOLDER / "family.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = {(row["method"], row["dataset"], row["seed"]): float(row["val_loss"]) for row in rows}
    seeds, tasks = (list(dict.fromkeys(row[key] for row in rows)) for key in ("seed", "dataset"))
    for method in dict.fromkeys(row["method"] for row in rows):
        if method != "RandLoRA-6":
            found = [
                Estimate(tuple(losses[method, task, s] - losses["RandLoRA-6", task, s] for s in seeds))
                for task in tasks
            ]
            lower = sum(one.mean < -(one.error or 0) for one in found)
            yield [
                method,
                *(f"{formatted(one.mean, '+.3f')} ± {one.error:.3f}" for one in found),
                f"{lower} of {len(tasks)}",
            ]


def tables_of(page: str) -> list[list[list[str]]]:
    return [rows_of(part, "|")[1:] for part in page.split("\n\n") if part.startswith("|")]


def decimals(text: str) -> set[str]:
    return set(re.findall(r"\d+\.\d+", text))


def intervals(text: str) -> set[str]:
    """Means with their intervals, without signs, which words can replace."""
    return set(re.findall(r"\d+\.\d+ ± \d+\.\d+", " ".join(text.split())))


def signed(text: str) -> set[str]:
    """Means that have a sign, with their intervals."""
    return set(re.findall(r"[+-]\d+\.\d+ ± \d+\.\d+", " ".join(text.split())))


def test_every_table_of_the_verdict_is_in_a_report() -> None:
    told = tables_of((FOLDER / "verdict.md").read_text(encoding="utf-8"))
    expected = [list(rows(name)) for name in NAMES for rows in (pairs, methods, datasets, correlations)]
    expected += [list(together("evidence")), list(family())]
    for table in expected:
        assert table in told, table
    assert len(told) == len(expected)


def test_every_decimal_of_the_verdict_is_in_its_tables() -> None:
    page = prose_of((FOLDER / "verdict.md").read_text(encoding="utf-8"))
    tables = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    sentences = "\n".join(line for line in page.splitlines() if not line.startswith("|"))
    assert decimals(sentences) <= decimals(tables)
    assert intervals(sentences) <= intervals(tables)
    assert signed(sentences) <= signed(tables)


def test_the_counts_of_the_verdict_are_those_of_the_runs() -> None:
    page = " ".join((FOLDER / "verdict.md").read_text(encoding="utf-8").split())
    scores: dict[tuple[str, str, str], list[float]] = {}
    for name in NAMES:
        trained = [cell for cell in cells_of(name) if cell["method"] != "zero-shot"]
        assert f"{len(trained)} runs of {len({cell['method'] for cell in trained})}" in page
        for cell in cells_of(name):
            scores.setdefault((name, cell["method"], cell["dataset"]), []).append(float(cell["accuracy"]))

    def ahead(name: str, one: str, other: str) -> dict[str, Estimate]:
        """One method minus another by dataset, whose runs are in the order of the seeds."""
        places = [where for sweep, method, where in scores if (sweep, method) == (name, one)]
        pairs = {where: zip(scores[name, one, where], scores[name, other, where], strict=True) for where in places}
        return {where: Estimate(tuple(first - second for first, second in pair)) for where, pair in pairs.items()}

    small = ahead("evidence", *SIZES["evidence"][0])
    assert (len(small), sum(one.mean > 0 for one in small.values())) == (8, 7)
    found = [ahead("evidence_texts", *pair) for pair in SIZES["evidence_texts"]]
    twelve = [one for each in found for where, one in each.items() if where.endswith("scores")]
    assert len(twelve) == 12 and max(one.mean for one in twelve) < 0
    assert sum(one.mean + (one.half or 0) < 0 for one in twelve) == 9
    tones = {key[1]: Estimate(tuple(values)) for key, values in scores.items() if key[2] == "emoji_tones"}
    before = tones.pop("zero-shot").mean
    assert (len(tones), sum(abs(one.mean - before) <= (one.half or 0) for one in tones.values())) == (19, 16)
    for words in (
        "on seven of eight datasets",
        "Nine of these twelve intervals exclude zero",
        "the intervals of 16 of 19",
    ):
        assert words in page


def test_the_pages_quote_the_verdict() -> None:
    """README's table and method.md's answer have rows and numbers of the reports."""
    scores = {name: {row[0]: row for row in methods(name)} for name in NAMES}
    told = rows_of(PAGES["README.md"], "| trained parameters |")[1:]
    assert told == [
        [f"{method} on {KINDS[name]}", *(scores[name][pair[side]][3] for pair in SIZES[name])]
        for name in NAMES
        for side, method in enumerate(("RandLoRA", "LoRA"))
    ]
    known = (FOLDER / "verdict.md").read_text(encoding="utf-8")
    answer = PAGES["docs/method.md"].split("## The answer so far")[1].split("\n## ")[0]
    assert decimals(answer) and decimals(answer) <= decimals(known)
    parts = [part for page in PAGES.values() for part in re.split(r"\n\n|\n- ", page)]
    quotes = [part for part in parts if "evidence/verdict.md" in part]
    assert sum(bool(intervals(quote)) for quote in quotes) >= 5
    for quote in quotes:
        assert intervals(quote) <= intervals(known), quote
        assert signed(quote) <= signed(known), quote
