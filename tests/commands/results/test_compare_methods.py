"""``compare-methods``: a comparison on own images, from the plan to the page."""

import html
import json
import re
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from randlora_pl.adapters import RandLoRA
from randlora_pl.commands import comparison
from randlora_pl.commands.compare_methods import described
from randlora_pl.commands.sweep import config_of_run
from randlora_pl.commands.sweep_job import WorkOptions
from randlora_pl.data import ImageData
from randlora_pl.data.sources import FileImages
from randlora_pl.run.options.compose import flatten
from randlora_pl.sweep import SweepConfig, timing
from randlora_pl.sweep.loop import Runner
from randlora_pl.sweep.plan import Cell, plan
from tests.docs.pages import DIGITS
from tests.support.cli import Refused, Run
from tests.support.products import in_one_item

ROOT = Path(__file__).resolve().parents[3]
PROBE = {"config": "linear_probe", "head_learning_rate": 1e-2}
METHODS = {"probe": PROBE, "RandLoRA-6": {"adapter": "RandLoRA", "rank": 6}}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs a base model for your own images. Choose one: --config"),
        (["--seeds", "x"], "invalid int"),
        (["--lists"], "unrecognized"),
        (["--data.root", "own"], "needs a base model for your own images. Choose one: --config"),
        (
            ["--config", "compare_bases"],
            "compare_bases is a sweep, not a base model. Run it: randlora-pl sweep",
        ),
        (["--config", "tiny_clip", "--config", "compare_bases", "--budget", "5m"], "is a sweep, not a base model"),
        (["--config", "typo.yaml"], "typo.yaml is a sweep, not a base model"),
        (["--config", "gone.yaml"], "Unknown config"),
    ],
)
def test_bad_words_are_refused(refused: Refused, tmp_path: Path, words: list[str], said: str) -> None:
    typo = "model: {name: tiny}\ndata: {dataset: digits}\nmethods: {a: {method: LoRA}}\n"
    (tmp_path / "typo.yaml").write_text(typo)
    text = refused("compare-methods", *words)
    assert said in text and "sweep --help" not in text


@in_one_item(
    ("words", "said"),
    [
        (["--config", "tiny_clip", "--budget", "soon"], "--budget soon: expected a time such as 90s, 30m"),
        (["--config", "tiny_clip", "--budget", "5m", "--jobs", "2"], "--budget is the time of one process"),
        (["--config", "tiny_clip", "--bugdet", "5m"], "Did you mean '--budget'"),
        (["--config", "tiny_clip", "--margin", "-1"], "--margin is -1"),
        (["--config", "tiny_clip", "--data.rot", "own"], "Did you mean --data.root"),
        (["--config", "tiny_clip", "--only", "seed=1"], "unrecognized arguments: --only"),
        (["--config", "tiny_clip", "--tune"], "unrecognized arguments: --tune"),
        (["--config", "tiny_clip", "--max-hours", "2"], "does not accept --max-hours. Set --budget"),
        (["--config", "tiny_clip", "--resume", "runs/a"], "Run the same command again to resume"),
        (["--config", "tiny_clip", "--seed_everything", "4"], "Set --seeds 1 2 3 4 5"),
        (["--config", "tiny_clip", "--from-adapter", "runs/a"], "starts from the pretrained model"),
        (["--config", "tiny_clip", "--model.adapter", "LoRA"], "methods come from --grid"),
        (["--config", "tiny_clip", "--model.adapter.rank", "4"], "methods come from --grid"),
        (["--config", "tiny_clip", "--model.learning_rate", "1e-3"], "The rates are searched"),
        (["--config", "tiny_clip", "--data.root", "gone"], "The data folder gone does not exist"),
        (["--config", "tiny_clip", "--data.train_split", "full"], "Remove --data.train_split full"),
        (["--config", "tiny_clip", "--trainer.limit_test_batches", "0"], "Remove limit_test_batches"),
        (["--config", "tiny_clip", "--model", "PromptTask"], "PromptTask trains prompts"),
        (["--config", "commonsense_qwen2"], "CausalLMTask reads texts. Write a sweep"),
        (["--config", "tiny_clip", "--data.dataset", "pairs", "--data.root", "."], "captions have no classes"),
        (["--config", "tiny_clip", "--methods", "lora"], "not one of the methods of own_data. Did you mean 'LoRA'"),
        (["--config", "tiny_clip", "--methods", "LoRA"], "A comparison needs two methods. Choose two or more"),
        (["--config", "tiny_clip", "--grid", "own_dat"], "Did you mean 'sweeps/own_data'"),
        (["--config", "tiny_clip", "--seeds", "1", "1"], "each number once"),
        (["--config", "tiny_clip", "--model.name", "nope"], "error: compare-methods: model: --model.name: neither"),
    ],
)
def test_bad_words_of_a_comparison_are_refused(refused: Refused, words: list[str], said: str) -> None:
    assert said in refused("compare-methods", *words)


@pytest.fixture
def own_images(tmp_path: Path) -> None:
    """Two classes of plain images in a folder each: 29 for training, 3 for validation and 8 for the test."""
    for label, colour in {"dark": 40, "light": 200}.items():
        for number in range(20):
            path = tmp_path / "own" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (colour + number, colour, colour)).save(path)


OWN = (
    *("compare-methods", "--config", "tiny_clip", "--data.root", "own", "--model.pretrained", "random"),
    *("--data.steps", "2", "--data.batch_size", "4", "--data.eval_batch_size", "16", "--trainer.accelerator", "cpu"),
    *("--methods", "linear probe", "LoRA"),
)


def test_a_plan_without_a_time_trains_nothing(run: Run, own_images: None, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    for more in ((), ("--budget", "30m")):
        result = run(*OWN, "--dry-run", *more)
        assert result.code == 0, result.err
        assert "own: 2 classes; train 29, val 3, test 8 images; 2 steps a run" in result.out
        assert re.search(r"LoRA +\S+ +8 +5\n", result.out) and "linear probe  head" in result.out
        assert "cannot give a verdict: 8 test images, 100 are needed." in result.out
    assert sorted(tmp_path.rglob("*")) == before


def test_the_printed_commands_train_what_was_compared(own_images: None, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "model: {name: tiny, learning_rate: 0.5, adapter: {class_path: RandLoRA, alpha: 7, rank: 3}}\n"
    )
    typed = ["--config", str(tmp_path / "base.yaml"), "--data.root", str(tmp_path / "own")]
    typed += ["--data.templates", "a {} one"]
    description, base = described(typed, [], "own_data", [1])
    it = comparison.Comparison(description, typed, base, "", WorkOptions(), tmp_path / "out", None, 1.0)
    cells = {cell.labels.method: cell for cell in plan(it.trained)}
    assert [*cells] == ["linear probe", "RandLoRA", "LoRA", "DoRA", "HiRA", "full fine-tuning"]
    for method, cell in cells.items():
        _, tree = config_of_run(shlex.split(it.command(cell))[2:])
        again = {name: value for name, value in flatten(tree).items() if name.startswith(("model", "data"))}
        assert again.pop("data.train_split") == "full"
        assert again.pop("model.adapter.alpha", None) in (None, RandLoRA().alpha)
        own = {name: value for name, value in flatten(cell.tree).items() if name.startswith(("model", "data"))}
        missing = dict.fromkeys(again.keys() - own.keys())
        assert again == missing | own, method
        assert flatten(cell.tree).get("model.learning_rate") is None, "the base's is of another method"


def test_what_stops_a_comparison_before_its_search(run: Run, own_images: None, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "own" / "dark", tmp_path / "single" / "dark")
    one = run(*OWN, "--data.root", "single", "--budget", "1h")
    assert one.code == 2 and not Path("runs").exists() and "single has one class, and a comparison needs two" in one.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("")
    other = run(*OWN, "--output", "full", "--dry-run")
    assert other.code == 2 and "full is not empty and has no comparison. Choose another folder with" in other.err
    failed = run(*OWN, "--budget", "1h", "--trainer.precision", "16-true")
    assert failed.code == 2
    assert re.search(r"linear probe cannot be trained: [^\n]+\. Leave it out: --methods LoRA\. Or fix it", failed.err)


@pytest.mark.parametrize("stops", [(), pytest.param((2, 2, 4), marks=pytest.mark.slow)])
def test_a_comparison_stopped_in_each_phase_ends_with_a_page(
    run: Run, own_images: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...]
) -> None:
    monkeypatch.setattr(timing, "TIERS", (timing.Tier(1, 1, 1),))
    monkeypatch.setattr("randlora_pl.lab.report.advice.draw", lambda *_: b"<svg></svg>")
    call, load, test = Runner.__call__, FileImages.load, comparison.Comparison.test
    counts, read, tested = [0, 0], set[str](), list[bool]()  # runs that began, and at which one Ctrl-C comes

    def counted(self: Runner, cell: Cell, folder: Path) -> bool:
        counts[0] += 1
        if counts[0] == counts[1]:
            raise KeyboardInterrupt
        return call(self, cell, folder)

    def noted(self: FileImages, index: int, short: int = 0) -> Any:
        if not tested:
            read.add(self.path(index).as_posix())
        return load(self, index, short)

    def begun(self: comparison.Comparison, description: SweepConfig, used: float) -> int:
        tested.append(True)
        return test(self, description, used)

    monkeypatch.setattr(Runner, "__call__", counted)
    monkeypatch.setattr(FileImages, "load", noted)
    monkeypatch.setattr(comparison.Comparison, "test", begun)
    words = (*OWN, "--budget", "1h", "--seeds", "3")
    for last in stops:  # in the measurement, in the search and in the tests
        counts[:] = [0, last]
        stopped = run(*words)
        assert stopped.code == 130 and "resume with: randlora-pl compare-methods --config tiny_clip" in stopped.err
    counts[:] = [0, 0]
    result = run(*words)
    trained = counts[0]
    assert result.code == 0 and (not stops or trained == 2), "the second and the third of three tested runs"
    folder = Path("runs/compare/own_tiny")
    page = (folder / "index.html").read_text(encoding="utf-8")
    sentence = result.out.split("\n\n")[-2].splitlines()[0]
    assert f"The page with all of it: {folder / 'index.html'}" in result.out and sentence in html.unescape(page)
    data = ImageData(dataset="folder", root="own", cache_images=False)
    data.setup()
    splits = {name: data.samples(name) for name in ("val", "test")}
    files = {name: {own.images.path(row).as_posix() for row in own.rows.tolist()} for name, own in splits.items()}
    assert files["val"] <= read, "all validation images were seen, so that reading was noticed"
    assert not files["test"] & read
    following = shlex.split(result.out.partition("Next: randlora-pl fit ")[2].partition("\n")[0])
    assert following[-2:] == ["--data.train_split", "full"]
    _, tree = config_of_run(following)
    model = tree["model"]["init_args"]
    tuned = json.loads((folder / "tune/tuning.json").read_text())["methods"]
    chosen = tuned["LoRA" if "LoRA" in str(model["adapter"]) else "linear probe"]["chosen"]
    assert chosen.items() <= model.items() and tree["data"]["root"] == "own"
    assert re.search(r"All runs took .+ of 1 h 00 min\.", result.out)
    table = (folder / "cells.csv").read_text(encoding="utf-8")
    former = shutil.copytree(next(folder.glob("cells/*")), folder / "cells" / "of-a-larger-plan") / "cell.json"
    for name, value in {"budget": "100%", "method": "LoRA", "seed": 4}.items():
        former.write_text(json.dumps(json.loads(former.read_text()) | {name: value}))
    again = run(*words)
    assert again.code == 0 and counts[0] == trained and sentence in again.out, "nothing is trained again"
    assert (folder / "cells.csv").read_text(encoding="utf-8") == table, "runs of another plan are kept, and not shown"
    assert former.is_file()
    other = run(*words[:-4], "--seeds", "3", "--data.flip", "false")
    assert other.code == 2 and "holds another sweep" in other.err and "Choose another --output" in other.err


def test_a_time_too_small_is_refused_with_what_fits(run: Run, own_images: None) -> None:
    result = run(*OWN, "--budget", "1s", "--data.steps", "5000")
    assert result.code == 2 and "Traceback" not in result.err
    assert re.search(r"budget is too small.* 2 methods.*\((LoRA|linear probe) \d+ \w+.*--budget \w+", result.err, re.S)


@pytest.mark.slow  # five minutes
def test_the_command_of_the_docs(run: Run, tmp_path: Path, deep: None) -> None:
    page = (ROOT / "docs/your_own_data.md").read_text(encoding="utf-8")
    exec(DIGITS, {})
    block = page.partition("## Which adapter?")[2].partition("```sh\n")[2].partition("```")[0]
    start = time.monotonic()
    result = run(*shlex.split(block.replace("\\\n", " "))[1:])
    assert result.code == 0, result.err
    assert time.monotonic() - start < 1.5 * 300, "about the budget"
    report = Path("runs/compare/digits_tiny/index.html").read_text(encoding="utf-8")
    for method in ("linear probe", "LoRA", "full fine-tuning"):
        assert method in report
    cells = [json.loads(file.read_text()) for file in Path("runs/compare/digits_tiny/cells").glob("*/results.json")]
    assert (
        all(cell["finished"] for cell in cells) and max(cell["test/acc"] for cell in cells if "test/acc" in cell) > 0.8
    )
