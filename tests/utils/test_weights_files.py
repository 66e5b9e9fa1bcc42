"""Adapters say name and hash of their base model's weights file; here it is found, or asked for."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from randlora_pl.adapters import read_adapter
from randlora_pl.adapters.save_load import copy_adapter
from randlora_pl.interop.base_model import load_base
from randlora_pl.models import load_clip
from randlora_pl.tasks import load_task
from randlora_pl.utils import weights_files
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.weights_files import (
    WEIGHTS_VARIABLE,
    base_arguments,
    file_sha256,
    find_weights,
    register_weights,
    remember,
    without_local_paths,
)
from tests.interop.adapters import saved
from tests.tasks.small import two_blocks


@pytest.fixture(autouse=True, scope="module")
def _shallow() -> Iterator[None]:
    with two_blocks():
        yield


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weights file in a folder whose name is nobody else's business, on a machine that knows no other."""
    monkeypatch.setenv("RANDLORA_PL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    folder = tmp_path / "ann's own"
    folder.mkdir()
    torch.save(load_clip("tiny", "random", seed=3).model.state_dict(), folder / "w.pt")
    return folder / "w.pt"


def test_no_file_of_an_adapter_says_where_the_weights_are(private: Path, tmp_path: Path) -> None:
    saved(tmp_path / "a", pretrained=str(private))
    copy_adapter(tmp_path / "a", tmp_path / "one.safetensors")
    for file in (*(tmp_path / "a").iterdir(), tmp_path / "one.safetensors"):
        assert b"ann's own" not in file.read_bytes()
    config = read_adapter(tmp_path / "a").config
    assert config["base_model"]["pretrained"] == config["metadata"]["arguments"]["pretrained"] == "w.pt"
    assert config["base_model"]["sha256"] == file_sha256(private)


def test_another_process_of_this_machine_finds_it(
    private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "a", pretrained=str(private))
    monkeypatch.setattr(weights_files, "_here", {})  # what only this process remembers
    assert load_task(tmp_path / "a").pretrained == str(private)
    assert load_base(read_adapter(tmp_path / "a")).part is not None


def test_another_machine_asks_for_it(private: Path, tmp_path: Path) -> None:
    task = saved(tmp_path / "a", pretrained=str(private))
    moved = tmp_path / "elsewhere" / "w.pt"
    moved.parent.mkdir()
    private.rename(moved)
    shutil.rmtree(tmp_path / "cache")
    message = (
        rf"weights of its base model tiny are the file w\.pt \(SHA-256 {file_sha256(moved)[:12]}.*--pretrained FILE"
    )
    for load in (load_task, lambda path: load_base(read_adapter(path))):
        with pytest.raises(UserError, match=message):
            load(tmp_path / "a")
    images = torch.rand(2, 3, 32, 32)
    for place in (moved, moved.parent):  # the file, or a folder of files
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        register_weights([place])
        with torch.no_grad():
            torch.testing.assert_close(load_task(tmp_path / "a").class_logits(images), task.class_logits(images))


def test_other_weights_are_refused_although_they_were_given(private: Path, tmp_path: Path) -> None:
    saved(tmp_path / "a", pretrained=str(private))
    other = tmp_path / "other.pt"
    torch.save(load_clip("tiny", "random", seed=4).model.state_dict(), other)
    forget_here = {"pretrained": "w.pt", "sha256": "0" * 64, "name": "tiny"}
    register_weights([other])
    assert find_weights(forget_here, "a") == str(other)
    register_weights([tmp_path / "other.pt", private])
    assert find_weights(read_adapter(tmp_path / "a").config["base_model"], "a") == str(private), "by its hash"
    with pytest.raises(UserError, match="--pretrained"):
        register_weights([tmp_path / "missing.pt"])


def test_bases_without_a_file_need_none() -> None:
    for base in ({}, {"name": "tiny", "pretrained": "random"}, {"name": "ViT-B-32", "pretrained": "openai"}):
        assert find_weights(base, "a") is None


def test_a_cache_that_cannot_be_written_is_no_mistake(private: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    digest = remember(private)
    assert find_weights({"pretrained": "w.pt", "sha256": digest}, "a") == str(private), "this process was given it"
    register_weights([private])
    assert find_weights({"pretrained": "w.pt", "sha256": digest}, "a") == str(private)


def test_a_name_without_an_ending_is_a_file_where_there_is_a_hash() -> None:
    config = {"base_model": {"pretrained": "/home/ann/epoch5", "sha256": "0" * 64}}
    assert json.loads(json.dumps(without_local_paths(config)))["base_model"]["pretrained"] == "epoch5"


def test_a_hash_of_a_stranger_names_no_file(tmp_path: Path) -> None:
    note = tmp_path / "note"
    note.write_text(str(note))
    for base in ({"name": "ViT-B-32", "sha256": str(note)}, {"name": "local-dir:x", "config_sha256": str(note)}):
        with pytest.raises(UserError, match="is not known on this machine"):
            base_arguments({"pretrained": "x.pt", **base}, "adapter")
