"""What an adapter is on the disk: folders and single files hold the same, and any change is noticed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from randlora_pl.adapters import save_load
from randlora_pl.adapters.save_load import (
    BASES,
    CONFIG,
    TENSORS,
    Contents,
    _read_contents,
    _write_contents,
    changed_parts,
    checksums,
)
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import edit


def contents(bases: bool = True) -> Contents:
    tensors = {"b.lambdas": torch.arange(6.0).view(2, 3), "a.scale": torch.tensor(2.5), "none": torch.empty(0, 4)}
    tensors["a.half"] = torch.randn(3, 2).bfloat16()
    config: dict[str, Any] = {"format_version": 4, "method": "RandLoRA", "name": "ümläut", "shapes": (1, 2), "x": 0.1}
    return Contents(config, tensors, {"A": torch.randn(1, 2, 3)} if bases else {})


def assert_same(found: Contents, wanted: Contents) -> None:
    assert {k: v for k, v in found.config.items() if k != "sha256"} == json.loads(json.dumps(wanted.config))
    for name in ("tensors", "bases"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


def test_a_folder_and_an_ordinary_safetensors_file_have_the_same_contents_and_checksums(tmp_path: Path) -> None:
    wanted = contents()
    _write_contents(tmp_path / "folder", wanted)
    _write_contents(tmp_path / "one.safetensors", wanted)
    folder, one = _read_contents(tmp_path / "folder"), _read_contents(tmp_path / "one.safetensors")
    assert_same(folder, wanted)
    assert_same(one, wanted)
    names = {"folder", TENSORS, CONFIG, BASES, "one.safetensors"}
    assert {path.name for path in tmp_path.rglob("*")} == names, "nothing temporary is left"
    assert folder.config == one.config
    assert folder.config["sha256"].keys() == {CONFIG, *wanted.tensors, "bases.A"}
    with safe_open(tmp_path / "one.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert set(file.keys()) == {*contents().tensors, "bases.A"}


def test_the_checksum_of_a_tensor_is_of_its_bits_shape_and_dtype() -> None:
    whole = contents()
    sums, tensor = checksums(whole), whole.tensors["b.lambdas"]
    shifts = 1e-3 * torch.eye(6).view(6, 2, 3)
    for variant in (tensor.view(3, 2), tensor.view(torch.int32), tensor.double(), *(tensor + shifts)):
        other = checksums(Contents(whole.config, whole.tensors | {"b.lambdas": variant}, whole.bases))
        assert {name for name in sums if sums[name] != other[name]} == {"b.lambdas"}


def test_a_tensor_that_is_no_contiguous_block_is_written_as_it_looks(tmp_path: Path) -> None:
    turned = torch.arange(6.0).view(2, 3).T
    _write_contents(tmp_path / "a", Contents({}, {"t": turned}))
    found = _read_contents(tmp_path / "a")
    assert torch.equal(found.tensors["t"], turned) and changed_parts(found) == []


@pytest.mark.parametrize("name", ["adapter", "adapter.safetensors"])
def test_every_change_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    _write_contents(path, contents())
    if path.is_dir():
        tensors = load_file(path / TENSORS)
        tensors["b.lambdas"][0, 0] += 1
        tensors["more"] = torch.zeros(1)
        del tensors["a.half"]
        save_file(tensors, path / TENSORS)
        assert changed_parts(_read_contents(path)) == ["a.half", "b.lambdas", "more"]
        config = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps(config | {"method": "LoRA"}))
        assert changed_parts(_read_contents(path)) == ["a.half", CONFIG, "b.lambdas", "more"]
        (path / BASES).unlink()
        assert "bases.A" in changed_parts(_read_contents(path))
    else:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        tensors["bases.A"][0] += 1
        save_file(tensors, path, metadata=metadata)
        assert changed_parts(_read_contents(path)) == ["bases.A"]


def test_checksums_that_are_none(tmp_path: Path) -> None:
    _write_contents(tmp_path / "a", contents())
    for sums in (7, "0" * 64, ["a"], {"a.scale": 3}, {}):
        edit(tmp_path / "a", lambda config, sums=sums: config.update(sha256=sums))
        assert changed_parts(_read_contents(tmp_path / "a"))


def test_an_older_adapter_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    for name in ("adapter", "adapter.safetensors"):
        _write_contents(tmp_path / name, contents())
        _write_contents(tmp_path / name, contents(bases=False))
        assert _read_contents(tmp_path / name).bases == {}
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="nothing"):
        _write_contents(tmp_path / "model.safetensors", contents())
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(UserError, match="safetensors"):
        _write_contents(tmp_path / "text.safetensors", contents())
    assert (tmp_path / "model.safetensors").read_bytes() == before
    (tmp_path / "photos" / "more").mkdir(parents=True)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "cat.jpg").touch()
    for folder, inside in (("photos", "more"), ("files", "cat.jpg")):
        with pytest.raises(UserError, match="contains more than an adapter"):
            _write_contents(tmp_path / folder, contents())
        assert sorted(entry.name for entry in (tmp_path / folder).iterdir()) == [inside]
    (tmp_path / "thesis").write_text("thesis")
    with pytest.raises(UserError, match="thesis"):
        _write_contents(tmp_path / "thesis", contents())
    assert (tmp_path / "thesis").read_text() == "thesis"
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("name", ["adapter", "adapter.safetensors"])
def test_a_write_that_fails_leaves_the_older_adapter(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_contents(tmp_path / name, contents())
    before = _read_contents(tmp_path / name)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save_load, "save_file", full)
    with pytest.raises(OSError, match="device") as caught:
        _write_contents(tmp_path / name, contents(bases=False))
    assert caught.value.filename == str(tmp_path / name)
    assert _read_contents(tmp_path / name).config == before.config
    monkeypatch.undo()
    with pytest.raises(TypeError, match="JSON"):
        _write_contents(tmp_path / name, Contents({"when": object()}, contents().tensors))
    assert _read_contents(tmp_path / name).config == before.config
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["adapter", "adapter.safetensors"])
def test_others_may_read_what_the_umask_lets_them(name: str, tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        _write_contents(tmp_path / name, contents())
    finally:
        os.umask(mask)
    files = list((tmp_path / name).iterdir()) if (tmp_path / name).is_dir() else [tmp_path / name]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}


def test_what_is_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    with pytest.raises(UserError, match="run/adapter"):
        _read_contents(tmp_path / "run")
    with pytest.raises(UserError, match="RUN/adapter"):
        _read_contents(tmp_path / "nowhere")
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="adapter_config"):
        _read_contents(tmp_path / "model.safetensors")
    (tmp_path / "cat.jpg").write_bytes(b"\xff\xd8" * 50)
    with pytest.raises(UserError, match=r"cat.jpg"):
        _read_contents(tmp_path / "cat.jpg")
    save_file({"w": torch.zeros(2)}, tmp_path / "list.safetensors", metadata={"adapter_config": "[1]"})
    with pytest.raises(UserError, match="JSON"):
        _read_contents(tmp_path / "list.safetensors")
