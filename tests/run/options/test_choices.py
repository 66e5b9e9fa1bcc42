"""The dataset that a data folder is, and base models that must be named."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from randlora_pl.data.validate import format_of
from randlora_pl.run.options.compose import compose
from randlora_pl.run.options.mistakes import choose_dataset
from randlora_pl.utils.errors import UserError
from tests.support.cli import Refused
from tests.support.products import in_one_item

FILES: dict[str, list[str] | str] = {
    "folder": ["cat/a.png", "dog/a.png"],
    "folder of splits": ["train/cat/a.png", "train/dog/a.png", "notes.txt"],
    "table": "path,label\n",
    "table of another kind": "file\tclass\n",
    "pairs": "image,caption,split\n",
    "hf": ["dataset_dict.json", "train/data-00000-of-00001.arrow"],
    "hf in Parquet": ["data/train-00000-of-00001.parquet"],
    "webdataset": ["train-000.tar"],
    "webdataset in parts": ["train/000.tar", "classnames.txt"],
}


def make(root: Path, files: list[str] | str) -> Path:
    """Write empty files below a folder, or one table."""
    if isinstance(files, str):
        root = root / f"own{'.tsv' if chr(9) in files else '.csv'}"
        root.write_text(files)
        return root
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@in_one_item("what", FILES)
def test_the_format_is_that_of_the_files(what: str, tmp_path: Path) -> None:
    assert format_of(make(tmp_path, FILES[what])) == what.partition(" ")[0]


@pytest.mark.parametrize("typed", ["train-{000..002}.tar", "https://a.org/x-{0..3}.tar", "a/*.tar"])
def test_patterns_and_urls_are_tar_shards(typed: str) -> None:
    assert format_of(Path(typed)) == "webdataset"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["cat/a.png", "train-000.tar"], "tar shards .*--data.dataset webdataset or --data.dataset folder"),
        ("path,label,caption\n", "--data.dataset table or --data.dataset pairs"),
        ("path,kind\n", "not data of a known format"),
        (["a.png", "b.png"], "not data of a known format: a sub-folder of images"),
    ],
)
def test_an_unclear_root_is_refused(files: list[str] | str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"(?s){words}"):
        format_of(make(tmp_path, files))


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path, ["train/cat/a.png"])

    def refuse(listing: Callable[..., Any], path: Any) -> Any:
        if Path(path) == root / "train" / "cat":
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "listdir", partial(refuse, os.listdir))
    monkeypatch.setattr(os, "scandir", partial(refuse, os.scandir))
    with pytest.raises(PermissionError, match="cat"):
        format_of(root)


@in_one_item(
    ("words", "dataset"),
    [
        ("--data.root own", "folder"),
        ("--config tiny_clip --data.root own", "folder"),  # the digits have no files
        ("--config clip_vitb32 --data.root own", "folder"),  # CIFAR-10 is not there
        ("--config clip_vitb32 --data.root downloads", "cifar10"),
        ("--config clip_vitb32 --data.root nowhere", "cifar10"),
        ("--config tiny_clip --data.dataset digits --data.root own", "digits"),
        ("--config table.yaml --data.root own", "table"),
        ("--config both.yaml", "digits"),
        ("--config tiny_clip --config both.yaml", "digits"),
        ("--config both.yaml --config tiny_clip", "digits"),  # such as a run tested on another dataset
        ("--config tiny_clip --config root.yaml", "folder"),  # as with a typed root
        ("--config root.yaml --config tiny_clip", "folder"),
        ("--model TextClassificationTask --data.root texts.csv", "csv"),
        ("--config glue_roberta_base --data.root texts.csv", "csv"),
        ("--config glue_roberta_base --data.root own", "sst2"),
        ("--config commonsense_phi3 --data.root answers", "jsonl"),
        ("--config commonsense_phi3 --data.root chats", "chat"),
        ("--config commonsense_phi3 --data.root chats/train.jsonl", "chat"),
        ("--config chat.yaml --config commonsense_phi3 --data.root answers", "jsonl"),
        ("--config commonsense_phi3 --config chat.yaml --data.root answers", "chat"),
    ],
)
def test_a_root_without_a_dataset_is_what_its_files_are(
    words: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("own"), ["cat/a.png", "dog/a.png"])
    make(Path("downloads"), ["cifar-10-batches-py/batches.meta"])
    make(Path("answers"), ["train.jsonl"])
    make(Path("chats"), ["train.jsonl"])
    Path("chats/train.jsonl").write_text('{"messages": []}')
    Path("chat.yaml").write_text("data: {dataset: chat}")
    Path("texts.csv").write_text("text,label\n")
    Path("table.yaml").write_text("data: {dataset: table}")
    Path("both.yaml").write_text("data: {dataset: digits, root: own}")  # such as the config of a sweep's run
    Path("root.yaml").write_text("data: {root: own}")
    command = compose("fit", words.split(), {"model": {"class_path": "VisionLanguageTask"}})
    choose_dataset(command)
    assert command.flat()["data.dataset"] == dataset


@pytest.mark.parametrize(("root", "words"), [("nowhere", "does not exist"), ("empty", "not data of a known format")])
def test_a_root_is_not_ignored_for_digits(root: str, words: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert words in refused("fit", "--config", "tiny_clip", "--data.root", root)


def test_the_toy_is_used_only_where_it_is_named(refused: Refused, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "own" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "own" / name / "a.png")
    for words in ("fit --data.dataset folder --data.root own", "fit --data.root own", "test --data.dataset digits"):
        message = refused(*words.split())
        assert "needs a base model" in message and "--config clip_vitb32" in message and "randlora-pl models" in message
    assert not (tmp_path / "runs").exists()
