"""``tune`` from the command line, and the search behind it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from randlora_pl.commands.sweep.job import find_sweep
from randlora_pl.data import ImageData
from randlora_pl.data.images.sources import ArrayImages
from randlora_pl.run.options.shipped import config_names, find_config
from randlora_pl.sweep.choice import best_of, climb
from randlora_pl.sweep.description import SweepConfig
from randlora_pl.sweep.folder import SweepFolder
from randlora_pl.sweep.provenance import chosen_for
from randlora_pl.sweep.tuning import Search
from randlora_pl.sweep.tuning_files import config_text, markdown
from randlora_pl.utils.errors import UserError
from tests.support.cli import SMALL, Run
from tests.support.products import in_one_item
from tests.sweep.grids import GRID, written

Refused = Callable[..., str]
TUNE = {"learning_rates": [1e-3, 1e-2, 1e30], "seeds": [0, 4]}
LORA = {"LoRA-4": {"adapter": "LoRA", "rank": 4, "paper_name": "LoRA4"}, "zero-shot": None}
LONG = GRID["set"] | {"data.steps": 3}


def search_of(**changes: Any) -> Search:
    return Search.of(SweepConfig.of(GRID | {"tune": TUNE} | changes))


def scored(search: Search, folder: SweepFolder, figure: Callable[..., float | None]) -> None:
    """Finishes the cells that have begun to be asked for with made-up figures; None is a failure."""
    for cell in search.first(folder) + search.second(folder):
        value = figure(cell)
        if value is None:
            folder.fail(cell, "the loss is nan. Try less")
        else:
            (folder.begin(cell) / "results.json").write_text(json.dumps({"finished": True, "val/acc": value}))


def test_the_best_of_equals_is_the_lowest() -> None:
    assert best_of({3: 0.5, 1: 0.5, 2: 0.7}, 2) == [2, 1] and best_of({}, 1) == []


@given(data=st.data(), size=st.integers(1, 9), start=st.floats(1e-6, 1e3))
def test_a_climb_ends_at_the_top_of_one_hill_and_only_ever_grows(data: st.DataObject, size: int, start: float) -> None:
    grid = [10.0 ** (i / 2 - 4) for i in range(size)]
    top = data.draw(st.integers(0, size - 1))
    heights = {value: -abs(i - top) for i, value in enumerate(grid)}
    known: dict[float, float] = {}
    part = climb(grid, start, known.get)
    assert len(part) == min(size, 3) or part[0] == grid[0] or part[-1] == grid[-1]
    while missing := [value for value in part if value not in known]:
        known[missing[0]] = heights[missing[0]]
        grown = climb(grid, start, known.get)
        assert set(part) <= set(grown) and (len(missing) == 1 or grown == part)
        part = grown
    near = [grid[i] for i in (top - 1, top, top + 1) if 0 <= i < size]
    assert set(near) <= set(part), "the best and both its neighbours"


def test_a_search_that_climbs_leaves_out_what_is_far_from_the_best(tmp_path: Path) -> None:
    rates = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    methods = {"LoRA-4": {"adapter": "LoRA", "rank": 4, "learning_rate": 2e-3}}
    tune = {"learning_rates": rates, "seeds": [0, 4], "climb": True}
    search, folder = search_of(tune=tune, methods=methods), SweepFolder(tmp_path)
    heights = {1e-4: 0.2, 1e-3: 0.5, 1e-2: 0.6, 1e-1: None}

    def tried() -> list[float]:
        return sorted({cell.facts["learning_rate"] for cell in search.first(folder)})

    assert tried() == [1e-4, 1e-3, 1e-2]
    scored(search, folder, lambda cell: heights[cell.facts["learning_rate"]])
    assert tried() == [1e-4, 1e-3, 1e-2, 1e-1] and search.second(folder) == []
    scored(search, folder, lambda cell: heights[cell.facts["learning_rate"]])
    assert tried() == [1e-4, 1e-3, 1e-2, 1e-1], "the failed one is the lowest"
    assert {cell.facts["learning_rate"] for cell in search.second(folder)} == {1e-3, 1e-2}
    entries = search.report(folder)["methods"]["LoRA-4"]["tried"]
    assert [entry["learning_rate"] for entry in entries] == [1e-4, 1e-3, 1e-2, 1e-1]
    climbs_on(search, SweepFolder(tmp_path / "other"))


def climbs_on(search: Search, folder: SweepFolder) -> None:
    """The other seed makes the lowest rate that was tried the winner, and then the next one; the last one fails."""
    first, other = {1e-4: 0.5, 1e-3: 0.6, 1e-2: 0.1}, {1e-4: 0.8, 1e-3: 0.6, 1e-5: 0.9}

    def figure(cell: Any) -> float | None:
        return (first | {1e-5: 0.7} if cell.labels.seed == 0 else other).get(cell.facts["learning_rate"])

    for tried in ({1e-4, 1e-3}, {1e-4, 1e-3, 1e-5}, {1e-4, 1e-3, 1e-5}):
        scored(search, folder, figure)
        assert {cell.facts["learning_rate"] for cell in search.second(folder)} == tried
    assert {cell.labels.seed for cell in search.second(folder) if cell.facts["learning_rate"] == 1e-5} == {0, 4}
    assert search.chosen(folder) == {"LoRA-4": {"learning_rate": 1e-5}}
    assert search.finished(folder) and search.edges(folder) == ["LoRA-4 (1e-05)"]


def test_every_candidate_with_one_seed_and_the_two_best_with_all(tmp_path: Path) -> None:
    search, folder = search_of(tune=TUNE | {"learning_rates": [1e-4, 1e-3, 1e-2, 1e30]}), SweepFolder(tmp_path)
    assert len(search.first(folder)) == 4 * 2 and search.second(folder) == []
    first = {1e-4: 0.2, 1e-3: 0.5, 1e-2: 0.6}
    later = {1e-3: 0.9, 1e-2: 0.6}

    def figure(cell: Any) -> float | None:
        rate = cell.facts["learning_rate"]
        return (first if cell.labels.seed == 0 else later).get(rate)

    scored(search, folder, figure)
    second = search.second(folder)
    assert {(cell.labels.seed, cell.facts["learning_rate"]) for cell in second} == {(4, 1e-3), (4, 1e-2)}
    scored(search, folder, figure)
    assert search.chosen(folder) == {name: {"learning_rate": 1e-3} for name in GRID["methods"]}
    report = search.report(folder)
    tried = report["methods"]["LoRA-4"]["tried"]
    assert [entry["val/acc"] for entry in tried] == [{"0": 0.2}, {"0": 0.5, "4": 0.9}, {"0": 0.6, "4": 0.6}, {}]
    assert tried[3]["failed"].startswith("the loss is nan")
    table = markdown(report)
    assert "| LoRA-4 | learning_rate 0.001 | 50.0 | 90.0 | 70.0 | chosen |" in table
    assert "| LoRA-4 | learning_rate 1e+30 |  |  |  | failed: the loss is nan. Try less |" in table
    assert search.edges(folder) == []


def test_a_method_of_models_that_are_left_out_is_not_searched(tmp_path: Path) -> None:
    models = {"tiny": GRID["models"]["tiny"], "other": {"config": "quickstart"}}
    methods = {"LoRA-4": {"adapter": "LoRA"}, "VeRA": {"adapter": "VeRA", "models": ["other"]}}
    search = search_of(models=models, methods=methods, tune=TUNE | {"climb": True})
    search.keep({("tiny", "digits")})
    assert list(search.names) == ["LoRA-4"] and {cell.labels.model for cell in search.all_cells()} == {"tiny"}
    scored(search, SweepFolder(tmp_path), lambda cell: 0.5)
    assert list(search.report(SweepFolder(tmp_path))["methods"]) == ["LoRA-4"]


def test_a_rate_at_the_end_of_the_grid_is_told(tmp_path: Path) -> None:
    search, folder = search_of(tune={"learning_rates": [1e-3, 1e-2], "seeds": [0]}, methods=LORA), SweepFolder(tmp_path)
    scored(search, folder, lambda cell: cell.facts["learning_rate"])
    assert search.edges(folder) == ["LoRA-4 (0.01)"] and search.flat(folder) == []


def test_rates_that_do_equally_well_are_told(tmp_path: Path) -> None:
    search, folder = search_of(tune={"learning_rates": [1e-3, 1e-2], "seeds": [0]}, methods=LORA), SweepFolder(tmp_path)
    scored(search, folder, lambda cell: 0.1)
    assert search.flat(folder) == ["LoRA-4"]


def test_a_method_has_the_mean_over_data_sets_and_budgets(tmp_path: Path) -> None:
    datasets = {
        "a": {"dataset": "digits"},
        "b": {"dataset": "digits", "steps": 5},
        "c": {"dataset": "digits", "steps": 6},
    }
    tune = {"learning_rates": [1e-3, 1e-2], "seeds": [0], "datasets": ["a", "b"], "budgets": [2, 4]}
    search, folder = search_of(datasets=datasets, tune=tune, methods=LORA), SweepFolder(tmp_path)
    assert len(search.first(folder)) == 2 * 2 * 2
    better = {("a", "2-shot"): 0.9, ("a", "4-shot"): 0.1, ("b", "2-shot"): 0.1, ("b", "4-shot"): 0.1}
    scored(search, folder, lambda c: better[c.labels[1:3]] if c.facts["learning_rate"] == 1e-2 else 0.4)
    assert search.chosen(folder) == {"LoRA-4": {"learning_rate": 1e-3}}


def test_alphas_where_a_method_has_one_and_the_heads_rate_of_a_probe() -> None:
    methods = {"LoRA": {"adapter": "LoRA"}, "full": {"adapter": "FullFineTuning"}, "probe": {"config": "linear_probe"}}
    search = search_of(methods=methods, tune=TUNE | {"alphas": [1, 10]})
    assert search.names == {
        "LoRA": ("learning_rate", "alpha"),
        "full": ("learning_rate",),
        "probe": ("head_learning_rate",),
    }
    assert [len(search.candidates[name]) for name in methods] == [6, 3, 3]
    flat = search.cells["LoRA", (1e-2, 10.0), 0][0].flat
    assert (flat["model.learning_rate"], flat["model.adapter.alpha"]) == (0.01, 10)
    assert flat["trainer.limit_val_batches"] == 1, "all validation images, whatever the sweep has"
    texts = {"models": {"BERT": {"config": "glue_roberta_base"}}, "datasets": ["sst2"], "budgets": ["100%"], "set": {}}
    search = search_of(methods={"head": {"adapter": "LinearProbe"}}, tune=TUNE, **texts)
    assert search.names == {"head": ("learning_rate",)}, "the one rate of a task on texts"


def test_the_config_that_it_writes_is_the_sweep_with_the_best(tmp_path: Path) -> None:
    search, folder = search_of(methods=LORA), SweepFolder(tmp_path)
    scored(search, folder, lambda cell: 1 - cell.facts["learning_rate"] / 1e31)
    scored(search, folder, lambda cell: 1 - cell.facts["learning_rate"] / 1e31)
    text = config_text(search.tuned(folder), "# What it is\n")
    assert text.startswith("# What it is\ntitle: small\n")
    content = yaml.safe_load(text)
    assert content.pop("tuned") == "tuning.json"
    again = SweepConfig.of(content)
    assert again.methods == {"LoRA-4": LORA["LoRA-4"] | {"learning_rate": 1e-3}, "zero-shot": {}}  # type: ignore[operator]
    assert again.models == GRID["models"] and again.options == GRID["set"]


@in_one_item(
    ("change", "said"),
    [
        ({"tune": {}}, "tune.learning_rates is missing"),
        ({"tune": {"learning_rates": [0]}}, r"tune.learning_rates is \[0\]"),
        ({"tune": TUNE | {"alphas": ["x"]}}, "tune.alphas is"),
        ({"tune": TUNE | {"seeds": [1, 2]}}, "seeds and tune.seeds both contain 1"),
        ({"tune": TUNE | {"datasets": ["digit"]}}, "tune.datasets has 'digit'.*Did you mean 'digits'"),
        ({"tune": TUNE | {"climb": "yes"}}, "tune.climb is 'yes'"),
        ({"tune": TUNE | {"budgets": ["x"]}}, "budgets has 'x'"),
        ({"tune": TUNE | {"set": {"trainer": {"val_check_interval": 9}}}}, "tune.set has trainer.val_check_interval"),
        ({"methods": {"x": {"adapter": "LoRAA"}}}, "methods.x: Unknown adapter"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        search_of(**change)


def test_a_search_from_beginning_to_end_reads_no_test_image(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, methods=LORA, tune=TUNE | {"learning_rates": [1e-3, 1e30]}, set=LONG)
    data = ImageData(dataset="digits")
    data.setup()
    test, val = (set(data.samples(split).rows.tolist()) for split in ("test", "val"))
    read: set[int] = set()
    load = ArrayImages.load

    def noted(self: ArrayImages, index: int, short: int = 0) -> Any:
        read.add(int(index))
        return load(self, index, short)

    monkeypatch.setattr(ArrayImages, "load", noted)
    monkeypatch.setattr(ImageData, "test_dataloader", lambda self: pytest.fail("the test images were asked for"))
    result = run("tune", "small.yaml")
    assert result.code == 0, result.err
    assert read & val == val, "all validation images were seen, so that reading was noticed"
    assert not read & test
    assert "| LoRA-4 | learning_rate 1e+30 |  |  |  | failed: the loss is nan" in result.out
    assert "Written: runs/tune/small/tuned.yaml, tuning.md and tuning.json" in result.out
    assert "Next: randlora-pl sweep runs/tune/small/tuned.yaml" in result.out
    report = json.loads(Path("runs/tune/small/tuning.json").read_text())
    assert sorted(map(len, (e["val/acc"] for e in report["methods"]["LoRA-4"]["tried"]))) == [0, 2]
    figures = [json.loads(file.read_text()) for file in Path("runs/tune/small/cells").glob("*/results.json")]
    assert not [key for found in figures for key in found if key.startswith(("test/", "zeroshot/"))]
    for place in Path("runs/tune/small/cells").iterdir():
        assert (place / "failed.json").exists() or not (place / "adapter").exists()
    _, tuned = find_sweep("runs/tune/small/tuned.yaml")
    assert chosen_for(tuned.tuned, tuned.models["tiny"], "LoRA-4", tuned.methods["LoRA-4"])
    assert tuned.methods["LoRA-4"]["learning_rate"] == report["methods"]["LoRA-4"]["chosen"]["learning_rate"]


@pytest.mark.slow
def test_it_goes_on_where_it_stopped(run: Run, tmp_path: Path) -> None:
    written(tmp_path, methods=LORA, tune={"learning_rates": [1e-3, 1e-2], "seeds": [0, 4]})
    stopped = run("tune", "small.yaml", "--max-hours", "1e-9")
    assert stopped.code == 0 and "Resume with: randlora-pl tune small.yaml --max-hours" in stopped.out
    whole = run("tune", "small.yaml")
    report = Path("runs/tune/small/tuning.json").read_text()
    (cell, *_) = sorted(Path("runs/tune/small/cells").iterdir())
    shutil.rmtree(cell)
    again = run("tune", "small.yaml")
    assert again.out.count(", seed ") == 1 and whole.out.count(", seed ") == 4
    assert Path("runs/tune/small/tuning.json").read_text() == report


def test_a_search_is_refused_before_it_begins_where_cells_were_run_without_one(
    run: Run, refused: Refused, tmp_path: Path
) -> None:
    written(tmp_path, methods=LORA, tune=TUNE)
    (tmp_path / "runs/sweeps/small/cells/0123").mkdir(parents=True)
    assert "--tune --output runs/sweeps/small-tuned" in refused("sweep", "small.yaml", "--tune")


def test_only_some_methods(run: Run, refused: Refused, tmp_path: Path) -> None:
    written(tmp_path, tune=TUNE)
    dry = run("tune", "small.yaml", "--dry-run", "--only", "method=LoRA-4", "dataset=digits")
    assert dry.code == 0 and "3 cells: 3 open" in dry.out and "RandLoRA" not in dry.out
    assert "'LoRA-5'" in refused("tune", "small.yaml", "--only", "method=LoRA-5")
    assert "restricted" in refused("tune", "small.yaml", "--only", "seed=0")


def test_bad_words(refused: Refused, tmp_path: Path) -> None:
    written(tmp_path)
    assert "tune.learning_rates" in refused("tune", "small.yaml")
    written(tmp_path, tune=TUNE, set=GRID["set"] | {"data.train_split": "full"})
    assert "validation" in refused("tune", "small.yaml")
    stages = {"adapter": "VeRA", "first": {"adapter": "LoRA", "form": "absorbed"}}
    written(tmp_path, tune=TUNE, methods={"x": stages})
    for command in (["tune", "small.yaml"], ["sweep", "small.yaml", "--tune"]):
        assert "VeRA cannot absorb a LoRA" in refused(*command, "--dry-run")


@pytest.mark.parametrize("name", ["table4", pytest.param("table11", marks=pytest.mark.full)])
def test_a_shipped_sweep_without_rates_says_what_to_copy_and_add(
    name: str, run: Run, refused: Refused, tmp_path: Path
) -> None:
    told = refused("tune", name, "--dry-run")
    assert f"sweeps/{name} has no learning rates" in told and "site-packages" not in told
    for word in (f"config cp sweeps/{name} mine.yaml", "randlora-pl tune mine.yaml"):
        assert word in told
    assert run("config", "cp", f"sweeps/{name}", "mine.yaml").code == 0
    with Path("mine.yaml").open("a") as copy:
        copy.write(told.partition("as: ")[2].partition("; then")[0])
    search = Search.of(find_sweep("mine.yaml")[1])
    assert search.candidates["LoRA-4" if name == "table4" else "LoRA-32"] == [(1e-4,), (1e-3,), (1e-2,)]
    held = {cell.flat.get("data.validation") for cell in search.first(SweepFolder(tmp_path))}
    assert held == ({200} if name == "table4" else {None})


def test_the_offline_sweep_can_be_tuned() -> None:
    assert "sweeps/offline" in config_names() and find_config("offline").parent.name == "sweeps"
    _, description = find_sweep("offline")
    search = Search.of(description)
    assert set(search.names) == {label for label in description.methods if label != "zero-shot"}
    for method, names in search.names.items():
        tried = [values[0] for values in search.candidates[method]]
        assert description.methods[method][names[0]] in tried, "what is committed is among what is tried"


@pytest.mark.slow
def test_the_rate_of_a_single_run(run: Run, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("randlora_pl.commands.sweep.tune.RATES", [1e-3, 1e-2])
    words = [*SMALL[:-2], "--model.adapter", "LoRA", "--model.adapter.rank", "2"]
    result = run("tune", *words, "--output", "rates")
    assert result.code == 0, result.err
    tuning = json.loads(Path("rates/tuning.json").read_text())
    rate = tuning["methods"]["LoRA"]["chosen"]["learning_rate"]
    assert f"Best learning_rate of LoRA: {rate:g}" in result.out and f"--model.learning_rate {rate:g}\n" in result.out
    cells = [json.loads(file.read_text())["config"] for file in Path("rates/cells").glob("*/cell.json")]
    assert {cell["model.adapter.rank"] for cell in cells} == {2} and {cell["data.shots"] for cell in cells} == {2}
    assert tuning["finished"] and tuning["seeds"] == [1, 2] and tuning["budgets"] == ["2-shot"]
    assert "Did you mean" in refused("tune", "--config", "quickstart", "--data.shot", "2")
