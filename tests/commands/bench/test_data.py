import json
from pathlib import Path

from PIL import Image

from tests.support.cli import Run
from tests.support.products import in_one_item

QUICK = ("--image-size", "16", "--batch-size", "16", "--images", "80", "--rounds", "2", "--workers", "1")


def test_stages_of_the_input_pipeline_are_measured(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = run("bench", "data", "digits", *QUICK, "--output", str(file))
    assert done.code == 0 and "plain torchvision" in done.out and "times plain" in done.out
    report = json.loads(file.read_text())
    assert report["machine"]["cores"] >= 1 and report["options"]["images"] == 80
    assert len(report["stages"]["training"]["images_per_second"]) == 2
    assert "times_plain" in report["stages"]["training"] and "times_plain" not in report["stages"]["decode"]
    assert "exists" in run("bench", "data", "digits", *QUICK, "--output", str(file)).err


@in_one_item(
    ("words", "says"),
    [
        (["dat"], "Did you mean 'data'"),
        (["data", "digit"], "Did you mean 'digits'"),
        (["data", "digits", "--rounds", "0"], "--rounds is 0"),
        (["data", "digits", "--images", "100"], "too few to measure 2 workers"),
        (["data", "pairs", "--root", "x.csv"], "captions"),
        (["data", "digits", "--output", "nowhere/x.json"], "mkdir -p nowhere"),
        (["data", "cifar10", "--root", "."], "cifar10 is not in"),
        (["data", "folder"], "needs --root"),
    ],
)
def test_mistakes(run: Run, words: list[str], says: str) -> None:
    done = run("bench", *words)
    assert done.code == 2 and says in done.err and done.err.count("\n") <= 2


def test_a_folder_is_recognized_and_may_have_too_few_images(run: Run, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "own" / name / f"{number}.png")
    result = run("bench", "data", "--root", "own")
    assert result.code == 2 and "folder has 8 training images, and 512 are needed" in result.err


def test_without_a_verb_the_help_is_shown(run: Run) -> None:
    assert "bench data " in run("bench").out
