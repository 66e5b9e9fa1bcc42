"""Tables of numbers on the pages are what the program counts."""

import html
import re
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from statistics import fmean, harmonic_mean

import pytest
import torch
from pandas import concat, read_csv

from randlora_pl.adapters import LoRA, RandLoRA, inject, methods
from randlora_pl.commands.main import main
from randlora_pl.commands.sweep_job import find_sweep
from randlora_pl.lab.paper import cells as paper_cells
from randlora_pl.lab.paper import numbers
from randlora_pl.lab.report import Estimate, holm, shown, sign_flip_test
from randlora_pl.lab.teacher import POWERS
from randlora_pl.models import meta_clip, meta_vit
from randlora_pl.run.options.shipped import find_config
from randlora_pl.sweep import BEST, chosen_for
from randlora_pl.sweep.plan import Cell, plan
from randlora_pl.tasks.optim import IMAGES, TOWERS, default_learning_rate
from tests.docs.pages import DOCS, PAGES, RESULTS, ROOT, prose_of
from tests.prompts.test_counts import COUNTS
from tests.support.products import in_one_item, marked
from tests.support.scripts import load_script
from tests.support.trace.recorder import Call
from tests.support.trace.step import adapter_of, step_setup, trace_step

RANKS = PAGES["docs/rank_and_alpha.md"]
REPRODUCING = PAGES["docs/reproducing.md"]


def rows_of(page: str, header: str) -> list[list[str]]:
    """The rows of the table with this header."""
    table = next(part for part in page.split("\n\n") if part.startswith(header)).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (table[0], *table[2:])]


def decimals(text: str) -> set[str]:
    return set(re.findall(r"\d+\.\d+", text))


def intervals(text: str) -> set[str]:
    return set(re.findall(r"[+-]?\d+\.\d+ ± \d+\.\d+", " ".join(text.split())))


@pytest.mark.slow
def test_counts_of_ranks() -> None:
    header, randlora, lora = rows_of(RANKS, "| r | 2 |")
    for method, row in ((RandLoRA, randlora), (LoRA, lora)):
        for rank, count in zip(header[1:], row[1:], strict=True):
            assert f"{inject(meta_clip('ViT-B-32'), method(rank=int(rank))).trainable:,}" == count, (method, rank)


MATCHED = rows_of(RANKS, "| `match` |")[1:]
MATCHING = {1: "ViT-B-32", 2: "ViT-L-14", 4: "vit_base_patch14_dinov2"}


@pytest.mark.parametrize(
    ("column", "row"), marked(product(MATCHING, MATCHED), (1, MATCHED[0]).__eq__, pytest.mark.slow)
)
def test_matched_ranks(column: int, row: list[str]) -> None:
    model = MATCHING[column]
    backbone = meta_clip(model) if model.startswith("ViT") else meta_vit(model, 224)
    report = inject(backbone, RandLoRA(match=row[0].strip("`")))
    (note,) = (note for note in report.notes if note.startswith("matched"))
    rank, share = re.fullmatch(r"r = (\d+), (\S+) %", row[column]).groups()  # type: ignore[union-attr]
    assert f"rank {rank} has" in note and f"({share.replace('−', '-')} %)" in note, note


def test_learning_rates() -> None:
    names = {"full fine-tuning": "FullFineTuning", "linear probe": "LinearProbe"}
    found = set()
    for label, both, vision in rows_of(RANKS, "| method | both towers")[1:]:
        for part in re.sub(r" \(.*\)", "", label).split(", "):
            method = getattr(methods, names.get(part, part))()
            found.add(names.get(part, part))
            assert default_learning_rate(method, TOWERS) == float(both), part
            assert default_learning_rate(method, IMAGES) == float(vision), part
    assert found == {*methods.__all__} - {"Frozen"}  # which trains nothing


def test_published_accuracies_of_prompts() -> None:
    """The page has the rows of Table 5 and of published.csv, and accuracies by dataset have the printed means."""
    counts = PAGES["docs/methods/learned_prompts.md"]
    page = PAGES["docs/methods/published_prompts.md"]
    for name, learner, count in COUNTS:
        assert f"{count:,}" in counts or name == "tiny" or getattr(learner, "class_specific", False) or "L-14" in name
    published = page.partition("\n## Where papers and")[0]
    lines = [line for line in published.splitlines() if line.startswith("| ") and not line.endswith("| ours |")]
    assert len(lines) > 60 and all(line.endswith("| not measured |") for line in lines)
    for shots, method, *values, _ in rows_of(page, "| shots | method")[1:]:
        cells = [cell for cell in paper_cells(5) if cell.budget == f"{shots}-shot" and cell.method == "Maple + DePT"]
        assert method == "MaPLe + DePT" and [float(value) for value in values] == [cell.value for cell in cells]
    tables = [number for number in numbers() if number != "zero_shot"]
    cells = [cell for number in tables for cell in paper_cells(number) if cell.source]
    names = sorted({cell.method for cell in cells}, key=len, reverse=True)
    harmonic = {row[3] for row in rows_of(page, "| method | base")[1:]}
    for line in (line for line in lines if not re.match(r"\| \d", line)):
        name = next((name for name in names if line.startswith(f"| {name}")), "")
        values = {cell.value for cell in cells if cell.method.startswith(name)}
        assert {float(value) for value in decimals(line) - harmonic} <= values, line
    assert {cell.value for cell in cells} <= set(map(float, decimals(published)))
    for mean in (cell for cell in cells if cell.column == "Average"):
        columns = {cell.column for cell in cells if cell.table == mean.table} - {"Average"}
        values = [cell.value for cell in cells if cell[:4] == mean[:4] and cell.column in columns]
        if len(values) == len(columns):
            off = 0.05 if mean.value == round(mean.value, 1) else 0.02
            assert fmean(values) == pytest.approx(mean.value, abs=off), mean
    for base, new, printed in (row[1:4] for row in rows_of(page, "| method | base")[1:]):
        assert harmonic_mean([float(base), float(new)]) == pytest.approx(float(printed), abs=0.015)


def test_the_sweep_of_ones_own_can_be_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = PAGES["docs/your_own_data.md"]
    (sweep,), (search,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.S), re.findall(r"`(tune: .*?)`", page)
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(sweep + search, encoding="utf-8")
    assert main(["sweep", "mine.yaml", "--dry-run"]) == 0
    assert "9 cells: 9 open" in capsys.readouterr().out
    assert main(["tune", "mine.yaml", "--dry-run"]) == 0


SWEEPS = {row[0]: row for row in rows_of(REPRODUCING, "| sweep | runs | of one seed")[1:]}
TEXTS = ("table1", "table3_llama", "table4", "table6", "table10_llama", "table15")


def test_every_sweep_of_the_paper_is_on_the_page() -> None:
    for name, runs, *_ in SWEEPS.values():
        comment = " ".join(find_config(name).read_text(encoding="utf-8").replace("\n#", "").split())
        assert f"{runs} runs, not measured" in comment, name
    sweeps = {path.stem for path in (ROOT / "configs" / "sweeps").glob("*.yaml")}
    assert SWEEPS.keys() == {name for name in sweeps if re.match("table|figure", name)}


def check_sizes(name: str) -> None:
    """Compare runs, and cells of a seed."""
    cells = first_seed(name)
    trained = [cell for cell in cells if not cell.untrained]
    runs = len(trained) * len(find_sweep(name)[1].seeds) + len(cells) - len(trained)
    assert SWEEPS[name][1:3] == [f"{runs:,}", f"{len(cells):,}"]


def first_seed(name: str) -> list[Cell]:
    _, description = find_sweep(name)
    return plan(replace(description, seeds=description.seeds[:1]))


@in_one_item("name", TEXTS)
def test_sizes_of_sweeps_of_language_models(name: str) -> None:
    check_sizes(name)


@pytest.mark.slow
@in_one_item("name", sorted(SWEEPS.keys() - set(TEXTS)))
def test_sizes_of_sweeps_of_images(name: str) -> None:
    check_sizes(name)


def test_alignments_of_kernels_are_those_of_their_file() -> None:
    values = read_csv(DOCS / "kernels.csv")
    keys = ["model", "method", "trained"]
    seeds = values.groupby([*keys, "seed"])["alignment"].mean().groupby(keys)
    told = {
        (model, row[column].replace("`", "")): row[column + 1]
        for row in rows_of(PAGES["docs/analyses.md"], "| tiny CLIP | alignment |")[1:]
        for column, model in ((0, "tiny CLIP"), (2, "MiniLM"), (4, "SmolLM2"))
        if row[column]
    }
    means, spreads = seeds.mean(), seeds.std()
    measured = {
        (model, f"{name} ({trained:,})"): f"{mean:.4f} ± {spreads[model, name, trained]:.4f}"
        for (model, name, trained), mean in means.items()
    }
    assert measured.keys() - told.keys() == {("tiny CLIP", "LoRA-2 (46,592)")} and told.items() <= measured.items()
    by_seed = values.groupby(["model", "method", "seed"])["alignment"].mean()
    smallest = {"tiny CLIP": ("RandLoRA-48", "LoRA-1"), "MiniLM": ("RandLoRA-43", "LoRA-3")}
    for model, (ours, lora) in (smallest | {"SmolLM2": ("RandLoRA-480", "LoRA-1")}).items():  # as in README
        assert (by_seed[model, ours] > by_seed[model, lora]).all()
        sizes = values[values["model"] == model].groupby("method")["trained"].first()
        spread = by_seed[model].groupby("method").std()[sizes < 1.2 * sizes.min()]
        assert len(spread) > 1 and spread.idxmax() == lora
    text = "than LoRA on all three models, and LoRA's alignment varies most between seeds"
    assert text in " ".join(PAGES["docs/analyses.md"].split())
    quoted = re.findall(r"0\.9\d{3} ± 0\.\d{4}", " ".join(PAGES["docs/full_rank.md"].split()))
    assert len(quoted) == 7 and {*quoted} <= {*measured.values()}
    assert seeds.size().eq(3).all()


METHODS = ("full", "lora", "randlora", "randlora-hadamard")
MEMORY = {
    "CLIP-ViT-B/32": "clip_vitb32",
    "CLIP-ViT-L/14": "clip_vitl14",
    "CLIP-ViT-H/14": "clip_vith14",
    "DINOv2-ViT-B/14": "dinov2_vitb14",
}


@pytest.mark.full
@pytest.mark.parametrize("model", MEMORY)
def test_expected_memory(model: str) -> None:
    """The page has the peaks of steps; full fine-tuning of ViT-H/14 also has the paper's micro-batch."""
    setup, options = step_setup(MEMORY[model])
    whole, *others = (trace_step(setup, adapter_of(method, options))[0].peak / 1e9 for method in METHODS)
    first = f"{whole:.1f}"
    if model == "CLIP-ViT-H/14":
        smaller, _ = trace_step(replace(setup, batch_size=32, accumulate=4), adapter_of("full", options))
        first += f", {smaller.peak / 1e9:.1f} at 32"
    shown = [first, *(f"{other:.1f} ({100 * other / whole:.0f} %)" for other in others)]
    assert [model, str(setup.batch_size), *shown] in rows_of(REPRODUCING, "| model | micro-batch | full")


def on_h100(call: Call) -> float:
    """Seconds by the slowest limit: rate of products, bandwidth of the memory, and the smallest kernel."""
    rate = 600e12 if call.dtype in (torch.bfloat16, torch.float16) else 50e12
    cost = call.cost
    return max(cost.flops / rate, (cost.read + cost.written) / 2.75e12, cost.launches * 2.5e-6)


@pytest.mark.full
@pytest.mark.parametrize("config", ["clip_vitl14", "commonsense_llama3"])
def test_counted_steps(config: str) -> None:
    """The page has the counts of a step, and a GPU needs less time for RandLoRA than for full fine-tuning of CLIP."""
    setup, options = step_setup(config)
    if config == "commonsense_llama3":
        setup = replace(setup, batch_size=16, accumulate=1)
    seconds = {}
    for method in METHODS if config == "clip_vitl14" else METHODS[1:]:
        found, _ = trace_step(setup, adapter_of(method, options))
        sizes = (found.flops / 1e12, found.moved / 1e9, found.cast_bytes / 1e9, found.peak / 1e9)
        shown = " | ".join([f"{found.kernels:,}", *(f"{size:.1f}" for size in sizes)])
        assert f" | {shown} |\n" in PAGES["docs/speed.md"], method
        seconds[method] = sum(map(on_h100, found.calls))
    if config == "clip_vitl14":
        assert seconds["randlora-hadamard"] < seconds["randlora"] < seconds["lora"] < seconds["full"]


def rows_by_name(text: str) -> dict[str, str]:
    """The cells of all tables by the first of their row."""
    found: dict[str, str] = {}
    for label, cells in re.findall(r"^\| ([^|]+?)(?:<br>[^|]*)? (\|.*)", text, flags=re.M):
        found[label] = found.get(label, "") + cells
    return found


def written(path: Path) -> str:
    """The text of a report without its plots, with the rows of tables as in Markdown."""
    page = re.sub(r"<(svg|style|script).*?</\1>", " ", path.read_text(encoding="utf-8"), flags=re.S)
    rows = re.sub("<t[hd](?= |>)", " | <t", page).split("<tr")
    return html.unescape("\n".join(" ".join(re.sub("<[^>]+>", " ", f"<tr{row}").split()) for row in rows))


NOT_IN_REPORTS = {
    "evidence": {
        "0.007",
        "0.011",
        "0.053",
        "3.3",
        "0.032",
        "0.074",
        "0.081",
        "0.70",
        "0.24",
        "0.81",
        "0.95",
        "0.55",
        "1.47",
    },
    "offline": {"0.16", "0.56", "0.72"},
    "prompts": {"0.002", "73.8", "81.6"},
    "teacher": {"2.0", "2.1", "2.8", "3.5", "6.3"},
}
"""Decimals of verdicts that come from other files, or from rows of two methods in the other order."""
SECTIONS = {"offline": "Offline benchmark", "methods": "All methods", "prompts": "Learned prompts"}
VERDICTS = {
    name: PAGES["docs/results/sweeps.md"].partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    for name, heading in SECTIONS.items()
} | {path.parent.name: path.read_text(encoding="utf-8") for path in DOCS.glob("results/*/verdict.md")}


@in_one_item("name", VERDICTS.keys() - {"one_rate"})
def test_the_decimals_of_a_verdict_are_in_its_reports(name: str) -> None:
    """Those of a method's row are in rows of that method, those of the text in a report, and no others are excepted."""
    reports = "\n".join(written(path) for path in sorted(DOCS.glob(f"results/{name}*/index.html")))
    others = decimals(prose_of(VERDICTS[name])) - decimals(reports)
    rows = rows_by_name(reports)
    for label, cells in rows_by_name(VERDICTS[name]).items():
        others |= decimals(cells) - decimals(rows[label]) if label in rows else set()
    if name in OTHER_RULES:
        others -= decimals(str(by_the_other_rule(name)))
    assert "." in VERDICTS[name] and others == NOT_IN_REPORTS.get(name, set())


OTHER_RULES = {"evidence": "lowest_rates.csv", "evidence_texts": "best_rates.csv"}
"""Runs at the rates that another rule would choose."""
Pairs = dict[tuple[str, str], str]


def by_the_other_rule(name: str) -> tuple[dict[str, tuple[list[str], list[str]]], Pairs, Pairs]:
    """Rates and results by method, and differences and adjusted p of the planned pairs."""
    first, again = (read_csv(DOCS / "results" / name / file) for file in ("cells.csv", OTHER_RULES[name]))
    again["method"] = again["method"].str.removesuffix(" at the lowest rate")
    assert again["state"].eq("finished").all() and again.groupby("method").size().eq(40).all()
    runs = concat([first[~first["method"].isin(again["method"])], again])
    values = runs.pivot(index=["dataset", "seed"], columns="method", values="accuracy")
    rates = again.groupby("method")[[column for column in again if column.endswith("learning_rate")]].first()
    rates = rates.map("{:g}".format)
    rates.loc[rates.index == "head alone", "learning_rate"] = "-"  # it is the head's
    rows = {}
    for method, runs_of_it in again.groupby("method"):
        results = [shown(Estimate((*values[method].groupby("seed").mean(),)))]
        for column in (column for column in again if column.startswith("test/elsewhere/")):
            before = first.loc[first["method"] == "zero-shot", column].max()
            changes = 100 * (runs_of_it.groupby("seed")[column].mean() - before)
            results.append(shown(Estimate((*changes,)), "+.2f"))
        rows[method] = ([*rates.loc[method]], results)
    pairs = {
        (one, other): Estimate((*(values[one] - values[other]).groupby("dataset").mean(),))
        for one, other in find_sweep(name)[1].pairs
    }
    adjusted = [f"{p:.3f}" for p in holm([sign_flip_test(pair.values) for pair in pairs.values()])]
    return rows, {names: shown(pair, "+.2f") for names, pair in pairs.items()}, dict(zip(pairs, adjusted, strict=True))


@in_one_item("name", OTHER_RULES)
def test_the_tables_of_another_rule_are_of_their_runs(name: str) -> None:
    page = VERDICTS[name]
    again, pairs, adjusted = by_the_other_rule(name)
    told = min(adjusted.values()) if name == "evidence_texts" else adjusted["RandLoRA-6", "RandLoRA of rank 32"]
    assert f"adjusted p is {told}" in " ".join(page.split())
    planned = {row[0]: (row[3], row[-1]) for row in rows_of(page, "| method | parameters")[1:]}
    expected = {
        method: [*rates, *chain.from_iterable(zip(results, planned[method], strict=False))]
        for method, (rates, results) in again.items()
    }
    assert {row[0]: row[1:] for row in rows_of(page, "| method | rate")[1:]} == expected
    differences = {(row[0], row[1]): row[3] for row in rows_of(page, "| method | against | parameter ratio")[1:]}
    compared = {(row[0], row[1]): row[2:] for row in rows_of(page, "| method | against | difference |")[1:]}
    assert compared == {pair: [value, differences[pair]] for pair, value in pairs.items()}


def test_the_table_of_teachers_is_of_their_runs() -> None:
    """And so is what the page says about single teachers."""
    page = VERDICTS["teacher"]
    runs = read_csv(DOCS / "results" / "teacher" / "cells.csv")
    values = runs.pivot(index=["dataset", "seed"], columns="method", values="accuracy")
    pairs = [("RandLoRA-48", "LoRA-1"), ("RandLoRA-7", "LoRA-6"), ("RandLoRA-1", "LoRA-32")]
    rows = [
        [
            teacher,
            shown(Estimate((*of_it["full fine-tuning"],))),
            *(shown(Estimate((*(of_it[ours] - of_it[lora]),)), "+.1f") for ours, lora in pairs),
        ]
        for teacher, of_it in values.groupby("dataset")
    ]
    assert rows_of(page, "| teacher | full fine-tuning")[1:] == rows
    ahead = {row[0]: row[3].startswith("+") for row in rows}
    assert [teacher for teacher in ahead if not ahead[teacher]] == ["i^-1"]
    assert f"There it is behind by {rows[-1][3][1:]}." in " ".join(page.split())
    shares = re.findall(r"(\d+) % for `(.+?)`", " ".join(page.split()))  # of the six largest of 192 squares
    assert {spectrum for _, spectrum in shares} == POWERS.keys()
    for share, spectrum in shares:
        squares = torch.arange(1, 193) ** (2 * POWERS[spectrum])
        assert f"{100 * squares[:6].sum() / squares.sum():.0f}" == share


def test_the_losses_of_the_dictionary_are_of_its_search() -> None:
    losses = [
        f"{fmean(next(one for one in method['tried'] if one['learning_rate'] == rate)['val/loss'].values()):.{digits}f}"
        for method, digits in zip(find_sweep("dictionary")[1].tuned["methods"].values(), (2, 2, 3), strict=True)
        for rate in [method["chosen"]["learning_rate"]]
    ]
    told = "fell to {} with RandLoRA, to {} with LoRA of the same size, and to {} with full fine-tuning".format(*losses)
    assert told in " ".join(PAGES["docs/full_rank.md"].split())


def test_the_tables_of_one_rate_are_of_its_runs() -> None:
    script, page = load_script("one_rate"), " ".join(VERDICTS["one_rate"].split())
    runs = script.curves(DOCS / "results" / "one_rate" / "cells.csv")
    assert runs.shape == (112, 5) and runs.notna().all(axis=None)  # no run failed
    assert rows_of(VERDICTS["one_rate"], "| data | method | best |") == [list(script.HEADER), *script.summary(runs)]
    pairs = rows_of(VERDICTS["one_rate"], "| RandLoRA-6 minus | data |")[1:]
    apart, quarter = list[str](), list[str]()
    for data in ("mnist_5k", "fashion_mnist_unseen"):
        part, means = runs.loc[data], runs.loc[data].mean(axis=1)
        best = {name: means[name].idxmax() for name in means.index.unique(0)}
        low = best["RandLoRA-6"] / 4
        quarter.append(f"{means['RandLoRA-6'].max() - means['RandLoRA-6', low]:.1f}")
        at_best = {name: part.loc[name, rate] for name, rate in best.items()}
        for other in ("LoRA-32, official start", "LoRA-32", "full fine-tuning"):
            same = part.loc["RandLoRA-6", 0.001] - part.loc[other, 0.001]
            tuned = at_best["RandLoRA-6"] - at_best[other]
            assert [other, data, *(shown(Estimate((*some,)), "+.1f") for some in (same, tuned))] in pairs
        apart.append(shown(Estimate((*(at_best["LoRA-32"] - at_best["LoRA-32, official start"]),)), "+.1f"))
    said, tables = page.split(" ## In short ")[1].split(" ## The rates ")
    assert f"RandLoRA-6 loses {quarter[0]} points on MNIST-5k and {quarter[1]} on clothes" in said
    assert f"The two starts are {apart[0]} and {apart[1]} points apart" in said
    assert decimals(said) <= decimals(tables) | {quarter[1]} | decimals(" ".join(apart))


def test_pages_that_link_to_the_evidence_quote_its_intervals() -> None:
    known = intervals("".join(VERDICTS.values()))
    parts = [part for page in PAGES.values() for part in re.split(r"\n\n|\n- ", page)]
    quotes = [part for part in parts if "/verdict.md" in part or "full_rank.md" in part]
    assert sum(bool(intervals(quote)) for quote in quotes) >= 5
    for quote in quotes:
        assert all({one, f"+{one}", f"-{one}"} & known for one in intervals(quote)), quote
    ours, lora = (
        re.findall(rf"^\| {name} \| .* \| (\d+) \|$", VERDICTS["evidence_texts"], flags=re.M)[0]
        for name in ("RandLoRA-6", "LoRA")
    )
    assert f"a run took {lora} % of full fine-tuning's time, and RandLoRA's {ours} %" in " ".join(
        PAGES["docs/full_rank.md"].split()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", RESULTS)
def test_the_committed_report_is_what_its_cells_give(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = DOCS / "results" / name
    monkeypatch.setattr("randlora_pl.lab.report.files.draw", lambda *_: b"<svg></svg>")  # no plot is compared
    assert main(["report", str(folder), "--output", str(tmp_path / "again")]) == 0
    for file in ("index.html", "cells.csv"):
        assert written(tmp_path / "again" / file) == written(folder / file), file


@in_one_item("name", RESULTS)
def test_no_zero_of_a_report_is_negative(name: str) -> None:
    for path in (DOCS / "results" / name / file for file in ("index.html", "summary.csv")):
        text = re.sub(r"<svg.*?</svg>", "", path.read_text(encoding="utf-8"), flags=re.S)
        assert not re.findall(r'(?<![\w.("])-0(?:\.0+)?(?![\w.])', text), path


def test_the_sweeps_whose_rates_another_rule_chose_are_named() -> None:
    rules = {name: find_sweep(name)[1].tuned.get("rule", BEST) for name in RESULTS}
    others = " and ".join(f"`{name}`" for name, rule in rules.items() if rule != BEST)
    assert f"The committed sweeps except {others} were tuned that way." in RANKS


@in_one_item("name", RESULTS)
def test_the_provenance_of_a_sweep_is_in_its_folder(name: str) -> None:
    """Every rate that was tried, with its accuracies."""
    file, description = find_sweep(name)
    assert description.tuned == find_sweep(str(DOCS / "results" / name / "sweep.yaml"))[1].tuned
    (model,) = description.models.values()
    for label, facts in description.methods.items():
        assert label == "zero-shot" or chosen_for(description.tuned, model, label, facts)
    assert file.with_name(f"{name}.tuned.json").is_file()  # in the folder that the wheel has
