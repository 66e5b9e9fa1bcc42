import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.language.glue import TASKS, missing, read_glue
from randlora_pl.language.text_files import Examples
from randlora_pl.utils.errors import UserError
from tests.language.files import write, write_glue
from tests.support.products import in_one_item

SPLITS = ("train", "validation")


def test_every_task_is_read_from_its_columns(tmp_path: Path) -> None:
    write_glue(tmp_path)
    assert read_glue(tmp_path, "sst2", "train") == Examples(
        [
            ('hide new secretions from the "parental units',),
            ("contains no wit\u2028, only labored gags",),
            ('that loves its characters and "communicates',),
        ],
        [0, 0, 1],
    )
    assert read_glue(tmp_path, "sst2", "validation").labels == [0, 1, 1]
    assert read_glue(tmp_path, "cola", "train") == Examples(
        [("Our friends won't buy this \"analysis.",), ("They drank the pub.",)], [1, 0]
    )
    assert read_glue(tmp_path, "qnli", "validation") == Examples(
        [('When did "the third end?', "It ended in 3000 BC."), ("Where is it?", 'Nobody "knows".')],
        [0, 1],
    )
    assert read_glue(tmp_path, "rte", "train") == Examples(
        [("No weapons were found.", "Weapons were found."), ("A place of sorrow.", "A place.")],
        [1, 0],
    )
    assert read_glue(tmp_path, "mrpc", "validation") == Examples(
        [("They had published an advertisement.", "On June 10, they had published it.")], [1]
    )
    assert read_glue(tmp_path, "stsb", "validation") == Examples(
        [('A plane is "taking off.', "An air plane is taking off."), ("A man plays.", "A girl sings.")], [5.0, 0.5]
    )


@pytest.mark.parametrize("saved", ["disk", "parquet"])
@in_one_item("name", TASKS)
def test_data_sets_on_disk_give_the_same(tmp_path: Path, name: str, saved: str) -> None:
    datasets = pytest.importorskip("datasets")
    write_glue(tmp_path / "tsv")
    task = TASKS[name]
    texts = ("sentence1", "sentence2") if name == "mrpc" else task.texts
    label = datasets.ClassLabel(names=list(task.names)) if task.names else datasets.Value("float32")
    features = {column: datasets.Value("string") for column in texts} | {"label": label}
    parts = datasets.DatasetDict()
    for split in SPLITS:
        expected = read_glue(tmp_path / "tsv", name, split)
        columns = dict(zip(texts, map(list, zip(*expected.sentences, strict=True)), strict=True))
        rows = columns | {"label": expected.labels, "idx": list(range(len(expected.labels)))}
        parts[split] = datasets.Dataset.from_dict(rows, datasets.Features(features | {"idx": datasets.Value("int32")}))
    secret = {column: ["secret"] for column in texts} | {"label": [-1], "idx": [0]}
    parts["test"] = datasets.Dataset.from_dict(secret, parts["train"].features)
    if saved == "disk":
        parts.save_to_disk(str(tmp_path / "saved" / name))
    else:
        for split, data in parts.items():
            (tmp_path / "saved" / name).mkdir(parents=True, exist_ok=True)
            data.to_parquet(str(tmp_path / "saved" / name / f"{split}-00000-of-00001.parquet"))
    for split in SPLITS:
        assert read_glue(tmp_path / "saved", name, split) == read_glue(tmp_path / "tsv", name, split)
        assert missing(tmp_path / "saved", name, split) is None
    home = tmp_path / "saved" / name
    lost = home / ("train/state.json" if saved == "disk" else "train-00000-of-00001.parquet")
    lost.unlink()
    assert (
        missing(tmp_path / "saved", name, "train") == lost and missing(tmp_path / "saved", name, "validation") is None
    )
    with pytest.raises(UserError, match=f"no whole split 'train': {re.escape(str(lost))} does not exist"):
        read_glue(tmp_path / "saved", name, "train")


def test_what_is_missing_is_what_cannot_be_read(tmp_path: Path) -> None:
    write_glue(tmp_path)
    assert all(missing(tmp_path, name, split) is None for name in TASKS for split in SPLITS)
    for file in sorted(tmp_path.glob("*/*")):
        name = next(task.name for task in TASKS.values() if task.title == file.parent.name)
        kept = file.rename(tmp_path / "kept")
        lacking = {split: missing(tmp_path, name, split) for split in SPLITS}
        for split, path in lacking.items():
            if path is None:
                read_glue(tmp_path, name, split)
            else:
                with pytest.raises(UserError, match=f"{re.escape(str(path))} does not exist"):
                    read_glue(tmp_path, name, split)
        assert any(lacking.values()), file
        kept.rename(file)
    shutil.rmtree(tmp_path / "RTE")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'RTE' / 'train.tsv'} does not exist")):
        read_glue(tmp_path, "rte", "train")
    (tmp_path / "RTE").mkdir()
    assert missing(tmp_path, "rte", "train") == tmp_path / "RTE" / "train.tsv"


def test_a_part_of_the_parquet_files_is_no_split(tmp_path: Path) -> None:
    (tmp_path / "rte").mkdir()
    for name in (
        "train-00000-of-00003-0f1e.parquet",
        "train-00002-of-00003-0f1e.parquet",
        "training-00001-of-00003.parquet",
    ):
        (tmp_path / "rte" / name).touch()
    lost = tmp_path / "rte" / "train-00001-of-00003.parquet"
    assert missing(tmp_path, "rte", "train") == lost
    with pytest.raises(UserError, match=re.escape(str(lost))):
        read_glue(tmp_path, "rte", "train")
    (tmp_path / "rte" / "train-00001-of-00003-0f1e.parquet").touch()
    assert missing(tmp_path, "rte", "train") is None


@in_one_item(
    ("name", "split", "change", "said"),
    [
        ("rte", "validation", {}, "rte/train"),
        ("rte", "train", {"sentence2": None}, "'sentence2'"),
        ("rte", "train", {"label": [0, 2]}, "label"),
        ("stsb", "train", {"label": ["3", "4"]}, "row 0: the label '3' is not a score from 0 to 5"),
        ("stsb", "train", {"label": [3.0, None]}, "row 1: the label None is not a score"),
        ("stsb", "train", {"label": [3.0, 5.5]}, "row 1: the label 5.5 is not a score"),
        ("stsb", "train", {"sentence2": ["a", None]}, "row 1: 'sentence2' is not a text but None"),
        ("stsb", "train", {}, "cannot be read"),
    ],
)
def test_a_wrong_or_damaged_data_set_on_disk_is_told(
    tmp_path: Path, name: str, split: str, change: dict[str, Any], said: str
) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {"sentence1": ["a", "b"], "sentence2": ["a", "b"], "label": [0, 1]} | change
    rows = datasets.Dataset.from_dict({key: values for key, values in columns.items() if values})
    datasets.DatasetDict({split: rows}).save_to_disk(str(tmp_path / name))
    if said == "cannot be read":
        whole = read_glue(tmp_path, name, "train").labels
        assert whole == [0, 1] and all(isinstance(score, float) for score in whole), "whole numbers are scores"
        for file in (tmp_path / name / "train").glob("*.arrow"):
            file.write_bytes(b"damaged")
    with pytest.raises(UserError, match=said):
        read_glue(tmp_path, name, "train")


@in_one_item(
    ("folder", "lines", "said"),
    [
        (
            "RTE",
            ["index\tsentence1\tsentence2\tlabel", "0\ta\tb"],
            "line 2: 3 tab-separated fields, expected 4",
        ),
        ("RTE", ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\tmaybe"], "line 2: the label 'maybe' is not one of"),
        ("RTE", ["index\tsentence1\tlabel"], "line 1: the header lacks sentence2"),
        ("RTE", ["index\tsentence1\tsentence2\tlabel"], "has no examples"),
        ("RTE", [], "line 1: the header lacks"),
        ("CoLA", ["gj04\t1\t\ta", "sentence\tlabel"], "line 2: 2 tab-separated fields, expected 4"),
        ("CoLA", ["gj04\t2\t\ta"], "line 1: the label '2' is not one of 0, 1"),
        ("STS-B", ["sentence1\tsentence2\tscore", "a\tb\tnan"], "line 2: the score 'nan' is not a number from 0 to 5"),
        ("STS-B", ["sentence1\tsentence2\tscore", "a\tb\t7"], "line 2: the score '7'"),
    ],
)
def test_a_wrong_line_is_told_with_its_number(tmp_path: Path, folder: str, lines: list[str], said: str) -> None:
    write(tmp_path / folder / "train.tsv", *lines)
    with pytest.raises(UserError) as error:
        read_glue(tmp_path, folder.lower().replace("-", ""), "train")
    assert str(tmp_path / folder / "train.tsv") in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@in_one_item("name", TASKS)
def test_missing_files_tell_the_tree_and_where_to_get_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as error:
        read_glue(tmp_path, name, "train")
    first, second = str(error.value).split("\n")
    assert f"{TASKS[name].title}/train.tsv and {TASKS[name].title}/dev.tsv" in first
    assert "gluebenchmark.com" in second and "save_to_disk" in second
