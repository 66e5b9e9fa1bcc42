"""``analyze``: its table of verbs and pages, and each verb on three small runs."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.adapters import DoRA, FullFineTuning, RandLoRA, Together, VeRA
from randlora_pl.commands.analyze import advised, note_of
from randlora_pl.commands.main import main
from randlora_pl.lab.analysis import models
from randlora_pl.utils.errors import UnreadableImageError, UserError
from tests.support.cli import SMALL, Refused, Run
from tests.support.products import in_one_item
from tests.tasks.small import two_blocks

METHODS = {
    "lora": ("LoRA", "--model.adapter.rank", "2", "--model.adapter.alpha", "16"),
    "randlora": ("RandLoRA", "--model.adapter.rank", "16"),
    "full": ("FullFineTuning",),
}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("three")
    for name, method in METHODS.items():
        words = ["--model.adapter", *method, "--run.root", str(root), "--run.name", name]
        with two_blocks():
            assert main(["fit", *SMALL, "--trainer.limit_val_batches", "0", "--run.logger", "none", *words]) == 0
        os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)
    return {name: str(next((root / name).glob("2*"))) for name in METHODS}


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open() as stream:
        return list(csv.DictReader(stream))


def test_what_to_do_where_memory_runs_out_or_an_image_is_damaged() -> None:
    with pytest.raises(UserError, match="--batch-size"), advised(16):
        raise RuntimeError("CUDA out of memory")
    with pytest.raises(UserError, match="Replace"), advised(16):
        raise UnreadableImageError("a.png cannot be read: cut off.", "Skip it: --data.on_error skip")
    with pytest.raises(RuntimeError, match="else"), advised(16):
        raise RuntimeError("something else")


@in_one_item(
    ("words", "message"),
    [
        (["spectrm", "x"], "Unknown command analyze spectrm. Did you mean 'spectrum'"),
        (["spectrum", "nowhere"], "nowhere does not exist; a run folder is"),
        (["cka", "nowhere"], "give two or more runs"),
        (["cka", "a", "b", "--images", "3"], "--images is 3: give at least 4"),
        (["cka", "a", "b", "--device", "tpu"], "--device tpu is not on this machine"),
        (["landscape", "a", "b"], "expected three runs, got 2"),
        (["landscape", "a", "b", "c", "--grid", "2"], "--grid is 2: give a whole number of at least 3"),
        (["landscape", "a", "b", "c", "--share", "1.5"], "--share is 1.5: give a share"),
        (["landscape", "--resume", "nowhere"], "nowhere holds no landscape"),
        (["landscape", "a", "--resume", "nowhere"], "leave out a run"),
        (["landscape", "--resume", "nowhere", "--grid", "5"], "leave out --grid"),
        (["cka", "begun", "x"], "--resume"),
        (["forgetting", "a", "--datasets", "digts"], "Did you mean 'digits'"),
        (["forgetting", "a", "--datasets", "cifar10", "--root", "."], "data get cifar10"),
        (["forgetting", "a", "--datasets", "folder"], "needs --root"),
    ],
)
def test_mistakes(refused: Refused, words: list[str], message: str) -> None:
    Path("begun").mkdir(exist_ok=True)
    Path("begun/config.yaml").write_text("data: {dataset: digits}\n")  # of a run that is not finished
    assert message in refused("analyze", *words)


def test_spectrum(run: Run, three: dict[str, str], tmp_path: Path) -> None:
    words = ("analyze", "spectrum", three["lora"], three["randlora"] + "/adapter", three["full"])
    done = run(*words, "--output", "new/figures")
    assert done.code == 0, done.err
    folder = tmp_path / "new" / "figures"
    assert {path.name for path in folder.iterdir()} == {f"spectrum.{end}" for end in ("csv", "json", "png", "svg")}
    rows = rows_of(folder / "spectrum.csv")
    ranks = {row["adapter"]: {int(r["rank"]) for r in rows if r["adapter"] == row["adapter"]} for row in rows}
    assert ranks["LoRA rank 2, alpha 16.0"] == {2} and min(ranks["RandLoRA rank 16"]) > 100
    assert len(rows) == 12 + 12 + 17 and "FullFineTuning" in ranks
    content = json.loads((folder / "spectrum.json").read_text())
    assert content[0]["mean"]["rank"] == 2 and len(content[0]["layers"][0]["singular_values"]) == 192
    assert "12 of 17" in done.out and "Written: new/figures/: spectrum.csv (" in done.out
    assert "exists" in run(*words, "--output", "new/figures").err


def test_a_fit_to_an_update_of_its_own_form_is_circular() -> None:
    assert note_of(RandLoRA(rank=6)).startswith("Note: this update is RandLoRA's own, so the comparison is circular.")
    assert "LoRA and RandLoRA's own" in note_of(Together()) and "LoRA's own" in note_of(DoRA())
    assert note_of(FullFineTuning()) == note_of(VeRA()) == ""


def test_represent(run: Run, three: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(three["randlora"], tmp_path / "other")
    config = tmp_path / "other" / "config.yaml"
    config.write_text(config.read_text().replace("seed_everything: 0", "seed_everything: 1"))
    words = ("analyze", "represent", three["full"], "--ranks", "2", "8", "--sweeps", "3", "--lead", "weights", "other")
    done = run(*words, "--targets", "visual:fc1")
    assert done.code == 0, done.err
    (folder,) = (tmp_path / "runs" / "analyze" / "represent").iterdir()
    rows = rows_of(folder / "represent.csv")
    assert [row["layer"].rpartition(".")[2] for row in rows] == ["c_fc"] * 4
    assert [row["lora_rank"] for row in rows] == ["2", "2", "8", "8"]
    for row in rows:
        assert 0 < float(row["lora"]) <= float(row["randlora"]) < 1 <= float(row["bound"])
        assert abs(int(row["randlora_parameters"]) / int(row["lora_parameters"]) - 1) < 0.1
        assert all(0 < float(row[name]) < 1 for name in ("orthonormal", "led by weights", "led by other"))
    assert "predict neither loss nor accuracy" in done.out
    assert (folder / "represent.png").stat().st_size > 10_000 and "RandLoRA closer" in done.out
    assert "circular" not in done.out
    for wrong, said in (
        ((three["lora"], "--targets", "mlp"), "--targets"),
        ((three["full"], "--ranks", "500"), "500"),
        ((three["full"], "--lead", three["full"]), "so errors look too small"),
        ((three["full"], "--lead", three["lora"]), "so errors look too small"),
        ((*words[2:], "--targets", "visual:o"), "other does not change visual."),
    ):
        refused = run("analyze", "represent", *wrong)
        assert refused.code == 2 and said in refused.err and refused.err.count("\n") <= 2


def test_cka(run: Run, three: dict[str, str], tmp_path: Path) -> None:
    small = ("--images", "24", "--batch-size", "12")
    done = run("analyze", "cka", three["full"], three["lora"], three["full"], *small, "--output", "out")
    assert done.code == 0, done.err
    rows = rows_of(tmp_path / "out" / "cka.csv")
    assert {(row["block"], row["kind"]) for row in rows} == {(b, k) for b in "12" for k in ("attention", "mlp")}
    itself = [float(row["cka"]) for row in rows if row["run"] == three["full"]]
    other = [float(row["cka"]) for row in rows if row["run"] == three["lora"]]
    assert len(itself) == len(other) == 4
    assert all(abs(value - 1) < 1e-6 for value in itself) and all(0 < value < 1 - 1e-6 for value in other)
    assert "24 test images of digits" in done.out and (tmp_path / "out" / "cka.png").is_file()


def test_cka_over_data_sets(run: Run, three: dict[str, str], tmp_path: Path) -> None:
    """Runs of two datasets: the means are over both, and a run alone is refused."""
    for name in ("full", "lora"):
        shutil.copytree(three[name], tmp_path / f"other-{name}")
        config = tmp_path / f"other-{name}" / "config.yaml"
        text = config.read_text().replace("dataset: digits", "dataset: folder")
        config.write_text(text.replace("root: null", "root: my"))
    write_folder(tmp_path / "my")
    words = ("analyze", "cka", three["full"], three["lora"], "other-full", "--images", "16", "--batch-size", "8")
    refused = run(*words)
    assert refused.code == 2 and "other-full" in refused.err
    done = run(*words, "other-lora", "--output", "out")
    assert done.code == 0, done.err
    content = json.loads((tmp_path / "out" / "cka.json").read_text())
    assert content["images"] == ["16 test images of digits", "16 test images of folder"]
    first = [row["cka"] for row in content["rows"] if (row["block"], row["kind"]) == (1, "attention")]
    assert len(first) == 2 and first[0] != first[1]
    assert f"1      {sum(first) / 2:.4f}" in done.out


def write_folder(root: Path) -> None:
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(10):
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")


SMALL_GRID = ("--grid", "5", "--share", "0.5")


def test_landscape(run: Run, three: dict[str, str], tmp_path: Path) -> None:
    runs = [three[name] for name in METHODS]
    words = ("--grid", "3", "--share", "0.5", "--positions", "equilateral", "--output", "out")
    done = run("analyze", "landscape", *runs, *words)
    assert done.code == 0 and "The models are not points of this grid" in done.out, done.err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"landscape.{end}" for end in ("json", "png", "svg")]
    state = json.loads((tmp_path / "out" / "landscape.json").read_text())
    assert state["corners_differ_by"] < 1e-4 and state["images"] == 10 and state["trained_on"] == 20
    assert len(state["rows"]) == 3 and {len(row) for row in state["rows"]} == {3}
    assert min(state["distances"].values()) > 0 and len(state["barriers"]) == 3
    assert len({round(value, 4) for value in state["losses"]}) == 3
    assert "Loss on 10 of 20 training images of digits: LoRA rank 2" in done.out
    assert "A row of 3 points took" in done.out


@pytest.mark.slow
def test_a_killed_landscape_goes_on(
    run: Run, three: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(three["full"], tmp_path / "full")
    runs = [three["lora"], three["randlora"], "full"]
    write_folder(tmp_path / "my")
    refused = run("analyze", "landscape", *runs, "--dataset", "folder", "--root", "my")
    assert refused.code == 2 and "['cat'" in refused.err and not (tmp_path / "runs" / "analyze").exists()
    assert run("analyze", "landscape", *runs, *SMALL_GRID, "--output", "whole").code == 0
    count = 0
    plain = models.loss

    def counted(*args: Any) -> float:
        nonlocal count
        count += 1
        if count == 6 + 13:  # three runs, three corners; in the third row
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(models, "loss", counted)
    killed = run("analyze", "landscape", *runs, *SMALL_GRID, "--output", "killed")
    assert killed.code == 130 and "--resume" in killed.err
    state = json.loads((tmp_path / "killed" / "landscape.json").read_text())
    assert [row is None for row in state["rows"]] == [False, False, True, True, True]
    count = 100
    assert run("analyze", "landscape", "--resume", "killed").code == 0
    assert count == 100 + 6 + 15  # not the rows that were there
    whole, resumed = (json.loads((tmp_path / name / "landscape.json").read_text()) for name in ("whole", "killed"))
    assert whole == resumed
    before = count
    again = run("analyze", "landscape", "--resume", "killed")
    assert again.code == 0 and count == before  # nothing is computed, all is drawn
    shutil.copytree(three["lora"] + "/adapter", "full/adapter", dirs_exist_ok=True)
    refused = run("analyze", "landscape", "--resume", "killed")
    assert refused.code == 2 and "changed" in refused.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": [[1.0] * 3, [1.0], [1.0] * 3]}, "points of a row are missing"),
        ({"rows": [None, None]}, "rows are missing"),
        ({"rows": [3, None, None]}, "has no len"),
        ({"rows": [[1.0] * 3] * 3}, "it lacks data_set, images, labels, losses, trained_on"),
        ({"share": ...}, "it lacks share"),
    ],
)
def test_a_damaged_landscape_is_told(refused: Refused, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    state = dict.fromkeys(("positions", "margin", "share", "seed", "dataset", "root")) | {"runs": ["a", "b", "c"]}
    state |= {"grid": 3, "rows": [None] * 3} | change
    state = {name: value for name, value in state.items() if value is not ...}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "landscape.json").write_text(json.dumps(state))
    message = refused("analyze", "landscape", "--resume", str(tmp_path / "out"))
    assert "damaged" in message and said in message


def test_forgetting(run: Run, three: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "my")
    words = ("--datasets", "digits", "folder", "--root", "my", "--output", "out")
    done = run("analyze", "forgetting", three["lora"], three["full"], *words)
    assert done.code == 0, done.err
    rows = rows_of(tmp_path / "out" / "forgetting.csv")
    assert [(row["run"], row["dataset"]) for row in rows] == [
        (three[name], data) for name in ("lora", "full") for data in ("digits", "folder")
    ]
    assert rows[0]["before"] == rows[2]["before"] and rows[1]["before"] == rows[3]["before"]
    assert [row["images"] for row in rows] == ["360", "20", "360", "20"]
    for row in rows:
        assert float(row["change"]) == pytest.approx(float(row["after"]) - float(row["before"]))
    assert "mean change elsewhere" in done.out
    words = ("test", "--adapter", three["lora"] + "/adapter", "--run.root", "runs")
    assert run(*words, "--trainer.limit_test_batches", "1.0").code == 0
    (file,) = tmp_path.glob("runs/*-test/2*/results.json")
    tested = json.loads(file.read_text())["test/acc"]
    assert 100 * tested == pytest.approx(float(rows[0]["after"]), abs=1e-4), "as a test of all images says"
    pictures = sorted(path.relative_to(tmp_path) for path in (tmp_path / "my").rglob("*.png"))
    (tmp_path / "both.csv").write_text("path,labels\n" + "".join(f"{path},cat;dog\n" for path in pictures))
    monkeypatch.setattr("randlora_pl.models.text.zero_shot_accuracy", None)  # before any dataset is tested
    refused = run("analyze", "forgetting", three["lora"], "--datasets", "digits", "table", "--root", "both.csv")
    assert refused.code == 2 and "its images have several labels" in refused.err


def test_an_adapter_without_its_run_says_what_it_was_trained_on(
    run: Run, three: dict[str, str], tmp_path: Path
) -> None:
    for name in ("full", "lora"):
        shutil.copytree(three[name] + "/adapter", tmp_path / name)
    small = ("--images", "8", "--batch-size", "8")
    assert run("analyze", "cka", "full", "lora", *small, "--output", "out").code == 0
    for name in ("full", "lora"):
        file = tmp_path / name / "adapter_config.json"
        config = json.loads(file.read_text())
        del config["metadata"]["training"]["dataset"], config["sha256"]
        file.write_text(json.dumps(config))
    refused = run("analyze", "cka", "full", "lora", *small)
    assert refused.code == 2 and "--dataset" in refused.err
    assert run("analyze", "cka", "full", "lora", *small, "--dataset", "digits", "--output", "more").code == 0
