"""``zeroshot``: what the pretrained model gets right, beside the published figures."""

import json
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.data.catalog import PAPER
from randlora_pl.lab.paper import rows
from randlora_pl.lab.zeroshot import published
from randlora_pl.models import LoadedClip, ModelIdentity, clip, load_tokenizer
from randlora_pl.models.clip import resolve
from tests.data.readers import BUILDERS
from tests.support.cli import Refused, Run
from tests.support.products import in_one_item

pytestmark = pytest.mark.usefixtures("deep")
CPU = ("--device", "cpu", "--model.name", "tiny")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("RANDLORA_PL_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    for name in ("eurosat", "pascalvoc"):
        BUILDERS[name](tmp_path / "sets")
    return tmp_path / "sets"


def written(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("runs/zeroshot/*/zeroshot.json")
    return dict(json.loads(path.read_text(encoding="utf-8")))


@pytest.mark.slow
def test_digits_without_other_options_agree_with_the_test_verb(run: Run, tmp_path: Path) -> None:
    result = run("zeroshot", "--model.name", "tiny")
    assert result.code == 0, result.err
    assert "digits" in result.out and "published" not in result.out
    found = written(tmp_path)
    assert found["model"]["name"] == "tiny" and found["missing"] == [] and found["failed"] == {}
    digits = found["datasets"]["digits"]
    assert (digits["images"], digits["classes"], digits["templates"]) == (360, 10, 2)
    assert digits["published"] is None and digits["difference"] is None
    words = ["test", "--model.name", "tiny", "--trainer.accelerator", "cpu", "--run.root", "tests"]
    for name, prompts in (("single", "caption"), ("ensemble", "ensemble")):
        tested = run(*words, "--model.eval_prompts", prompts)
        assert f"accuracy {digits[name]:.2f} %" in tested.out, tested.err


def test_all_lists_what_is_missing(run: Run, tmp_path: Path, sets: Path) -> None:
    result = run("zeroshot", *CPU, "--data.dataset", "all", "--data.root", str(sets))
    assert result.code == 0, result.err
    found = written(tmp_path)
    assert list(found["datasets"]) == ["eurosat", "pascalvoc"]
    assert found["missing"] == [name for name in PAPER if name not in ("eurosat", "pascalvoc")]
    assert f"Missing in {sets}: cars, dtd, gtsrb" in result.out
    assert f"data check --all --fast --root {sets}" in result.out


def test_published_figures_and_the_difference(
    run: Run, tmp_path: Path, sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    original = clip.load_clip

    def posing(*args: Any, **options: Any) -> LoadedClip:
        loaded = original(*args, **options)
        loaded.model.visual.register_forward_hook(lambda module, given, output: sizes.append(len(given[0])))
        loaded.identity = ModelIdentity("open_clip", "ViT-B-32-quickgelu", "openai", loaded.image.size)
        loaded.__dict__["tokenizer"] = tokenizer
        return loaded

    tokenizer = load_tokenizer("tiny")
    monkeypatch.setattr(clip, "load_clip", posing)
    words = ("--data.dataset", "eurosat", "--data.root", str(sets), "--data.eval_batch_size", "10")
    result = run("zeroshot", *CPU, *words)
    assert result.code == 0, result.err
    assert sizes == [10, 10], "images are encoded once"
    eurosat = written(tmp_path)["datasets"]["eurosat"]
    assert eurosat["published"] == 45.19
    assert eurosat["difference"] == round(eurosat["ensemble"] - 45.19, 2)
    assert f"45.19        {eurosat['difference']:+.2f}" in result.out
    assert "fredzzhang/atlas" in result.out and "drawn at random: eurosat." in result.out


@pytest.mark.slow
def test_damaged_data_set_stops_only_itself(run: Run, refused: Refused, tmp_path: Path, sets: Path) -> None:
    for path in sets.rglob("eurosat/**/*.jpg"):
        path.write_bytes(b"")
    message = refused("zeroshot", *CPU, "--data.dataset", "eurosat", "--data.root", str(sets))
    assert "--root" in message and "on_error" not in message
    result = run("zeroshot", *CPU, "--data.dataset", "all", "--data.root", str(sets))
    assert result.code == 1
    found = written(tmp_path)
    assert list(found["datasets"]) == ["pascalvoc"] and "cannot be read" in found["failed"]["eurosat"]
    assert "eurosat could not be tested: " in result.out


def test_interrupted(run: Run, tmp_path: Path, sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from randlora_pl.lab import zeroshot

    evaluate = zeroshot.evaluate

    def stop(clip: Any, data: Any, *more: Any) -> Any:
        if data.row.name == "pascalvoc":
            raise KeyboardInterrupt
        return evaluate(clip, data, *more)

    monkeypatch.setattr(zeroshot, "evaluate", stop)
    result = run("zeroshot", *CPU, "--data.dataset", "all", "--data.root", str(sets))
    assert result.code == 130 and "finished" in result.err
    assert list(written(tmp_path)["datasets"]) == ["eurosat"]


@in_one_item(
    ("words", "hint"),
    [
        (["--model.name", "ViT-B-23"], "ViT-B-32"),
        (["--model.name", "ViT-B-32"], "--model.pretrained with openai"),
        (["--data.dataset", "cifar10", "--data.root", "."], "randlora-pl data get cifar10 --root ."),
        (["--data.dataset", "cifar10", "--data.root", "nowhere"], "does not exist"),
        (["--data.dataset", "all", "--data.root", "."], "None of the paper's 22"),
        (["--data.dataset", "folder"], "--data.root"),
        (["--data.dataset", "pairs", "--data.root", "pairs.csv"], "randlora-pl test"),
        (["--model.name", "tiny", "--device", "cdua"], "there is"),
    ],
)
def test_mistakes(refused: Refused, words: list[str], hint: str) -> None:
    assert hint in refused("zeroshot", *words)


def test_published_figures_are_complete() -> None:
    names, *columns = zip(*map(dict.values, rows("zero_shot.csv")), strict=True)
    assert set(names) == set(PAPER)
    small, large = ([float(value) for value in column if value] for column in columns)
    assert round(sum(small) / 22, 2) == 60.50  # the means that the source gives
    assert len(large) == 20 and round(sum(large) / 20, 2) == 71.22
    assert [resolve(name, "openai").name for name in ("ViT-B-32", "ViT-L-14")] == list(rows("zero_shot.csv")[0])[1:]
    assert published("ViT-L-14-quickgelu", "openai", "cars") == 77.75
    for known in (("ViT-L-14-quickgelu", "openai", "ucf101"), ("ViT-B-32-quickgelu", "openai", "digits")):
        assert published(*known) is None
    for other in (("ViT-B-32", "laion2b_s34b_b79k"), ("ViT-B-16-quickgelu", "openai")):
        assert published(*other, "cars") is None
