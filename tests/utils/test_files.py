"""Files and folders appear whole or not at all, and documents of strangers are read safely."""

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml

from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import (
    DEEPEST,
    LARGEST,
    atomic_file,
    atomic_folder,
    disk_errors,
    move,
    parse_json,
    parse_yaml,
    remove_leftovers,
    scratch_folder,
    write_bytes,
    write_text,
)
from tests.support.products import in_one_item


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_of_any_other(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_bytes(tmp_path / "made" / "file", b"content")
        (tmp_path / "other").write_bytes(b"content")
        with atomic_folder(tmp_path / "folder") as part:
            (part / "private").touch(0o600)
        assert os.umask(mask) == mask, "the umask stays"
    finally:
        os.umask(before)
    file = tmp_path / "made" / "file"
    assert file.read_bytes() == b"content"
    for path in (file, tmp_path / "other", tmp_path / "folder" / "private"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path


def test_text_replaces_an_older_file_at_once(tmp_path: Path) -> None:
    for text in ("one\r\n", "zwei ü"):
        write_text(tmp_path / "new" / "a.txt", text)
        assert (tmp_path / "new" / "a.txt").read_bytes() == text.encode()
    assert names(tmp_path) == ["new", "new/a.txt"]


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_write_that_fails_leaves_the_older_file_or_folder(kind: type[BaseException], tmp_path: Path) -> None:
    write_text(tmp_path / "file", "older")
    write_text(tmp_path / "folder" / "inside", "older")
    with pytest.raises(kind), atomic_file(tmp_path / "file") as stream:
        stream.write(b"newer")
        fail(kind())
    with pytest.raises(kind), atomic_folder(tmp_path / "folder") as part:
        (part / "other").write_text("newer")
        fail(kind())
    with pytest.raises(kind), atomic_folder(tmp_path / "a" / "b" / "new") as part:
        fail(kind())
    assert names(tmp_path) == ["file", "folder", "folder/inside"], "folders that were made for it are gone, too"
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "inside").read_text() == "older"


def test_errors_name_the_final_path_and_others_their_own(tmp_path: Path) -> None:
    full = errno.ENOSPC, "No space left on device"
    with pytest.raises(OSError) as raised, atomic_file(tmp_path / "a"):
        fail(OSError(*full))
    assert raised.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError) as raised, atomic_folder(tmp_path / "b") as part:
        fail(OSError(*full, str(part / "weights")))
    assert raised.value.filename == str(tmp_path / "b")
    with pytest.raises(FileNotFoundError) as raised, scratch_folder(tmp_path / "c"):
        (tmp_path / "elsewhere").read_bytes()
    assert raised.value.filename == str(tmp_path / "elsewhere")
    with pytest.raises(OSError) as raised:
        write_text(tmp_path / ("n" * 300), "")
    assert raised.value.filename == str(tmp_path / ("n" * 300)) and names(tmp_path) == []
    with pytest.raises(UserError, match="No space") as caught, disk_errors(tmp_path / "a"):
        fail(OSError(*full))
    assert "--output" in caught.value.hint and caught.value.where == str(tmp_path / "a")


def test_several_may_write_the_same_file(tmp_path: Path) -> None:
    """Also beside what a process has left that was killed; the last one to end wins."""
    (tmp_path / ".a.part").write_text("half")
    with atomic_file(tmp_path / "a") as first, atomic_file(tmp_path / "a") as second:
        first.write(b"first")
        second.write(b"second")
    assert (tmp_path / "a").read_bytes() == b"first" and names(tmp_path) == [".a.part", "a"]
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["a"]


def test_a_new_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with atomic_folder(tmp_path / "made" / "folder") as part:
            assert part.name.startswith(".folder.part")
            (part / name).write_text(name)
    assert names(tmp_path) == ["made", "made/folder", "made/folder/two"]


def test_an_older_folder_comes_back_where_the_new_one_cannot_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "folder" / "old", "old")
    plain = Path.rename

    def rename(path: Path, target: Path) -> Path:
        return plain(path, target) if ".part" not in path.name else fail(OSError(errno.EIO, "broken")) or path

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="broken"), atomic_folder(tmp_path / "folder"):
        pass
    assert names(tmp_path) == ["folder", "folder/old"]


def test_what_a_process_left_that_was_killed_between_two_renames(tmp_path: Path) -> None:
    write_text(tmp_path / ".adapter.old-12" / "a", "old")
    write_text(tmp_path / ".adapter.part-12" / "a", "new")
    write_text(tmp_path / "checkpoints" / ".last.ckpt.part", "half")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["adapter", "adapter/a", "checkpoints"]
    assert (tmp_path / "adapter" / "a").read_text() == "old"


def _write_file(path: Path) -> None:
    write_text(path, "a")


def _write_folder(path: Path) -> None:
    with atomic_folder(path) as part:
        (part / "a").write_text("a")


def _move_file(path: Path) -> None:
    with scratch_folder(path) as part:
        (part / "a").write_text("a")
        move(part / "a", path)


@pytest.mark.parametrize("write", [_write_file, _write_folder, _move_file])
def test_the_disk_has_it_before_it_gets_its_name(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for owner, name in ((os, "fsync"), (Path, "replace")):
        plain = getattr(owner, name)

        def record(*args: Any, plain: Any = plain, name: str = name) -> Any:
            done.append(name)
            return plain(*args)

        monkeypatch.setattr(owner, name, record)
    write(tmp_path / "final")
    assert done == ["fsync", "replace"]


def test_it_needs_neither_torch_nor_lightning() -> None:
    code = "import sys, randlora_pl.utils.files; print({'torch', 'lightning', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k0: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [*{a}, *{a}, *{a}]}}\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


def test_json_is_refused_with_one_kind_of_error() -> None:
    assert parse_json(b'{"a": [1, 2.5, null, "x"]}') == {"a": [1, 2.5, None, "x"]}
    assert parse_json("[" * DEEPEST + "]" * DEEPEST)
    for text in ('{"a":' + "[" * 100_000, "[" * 101 + "]" * 101, "{", b"\xff", "1" * 5000, "[1" + "0" * 400 + "]", ""):
        with pytest.raises(ValueError):
            parse_json(text)


@in_one_item(
    ("text", "word"),
    [
        (BOMB, "aliases"),
        ("a: &a " + "x" * 10_000 + "\nb: [" + "*a," * 30 + "]", "aliases"),
        ("a: &a [*a]", "itself"),
        ("a: &a {b: {c: *a}}", "itself"),
        ("[" * LARGEST, "nested"),
        ("{a: " * 3000, "nested"),
        ("[" * 101 + "]" * 101, "nested"),
        ("\n".join(" " * depth + "a:" for depth in range(400)), "nested"),
        ("a: " + "1" * 5000, "digits"),
        ("a: 0x" + "f" * 5000, "digits"),
        ("a: " + "1:1" * 2000, "digits"),
        ("a: x\n" * (LARGEST // 5 + 1), "characters"),
        ("a: !!bool maybe", "KeyError"),
        ("a: !!timestamp 2026-01-02", "constructor"),
        ("a: !!set {b}", "constructor"),
        ("a: !!binary aGk=", "constructor"),
        ("a: !!omap [b: 1]", "constructor"),
        ("a: b\x07", r"U\+0007"),
        ("a: !!int ''", "Error"),
        ("? [a]\n: b", "unhashable"),
        ("a: !!python/object/apply:os.system [ls]", "constructor"),
        ("a: 1\na: 2", "duplicate"),
    ],
)
def test_yaml_is_refused_with_one_kind_of_error_and_at_once(text: str, word: str) -> None:
    calls = count()
    sys.setprofile(lambda *_: next(calls))
    try:
        with pytest.raises(yaml.YAMLError, match=word):
            parse_yaml(text)
    finally:
        sys.setprofile(None)
    assert next(calls) < 1_000_000, "calls and returns of functions"


def test_what_people_write_in_yaml_is_read() -> None:
    text = "lr: 1e-3\ndate: 2026-01-02\nx: &x {a: [1, 2], b: .5}\ny: {<<: *x, b: 2}\nz: [*x, *x]\n"
    found = parse_yaml(text)
    assert found["lr"] == 1e-3 and found["date"] == "2026-01-02" and found["y"] == {"a": [1, 2], "b": 2}
    assert parse_yaml(MERGES)["h"] == {"k0": 1}
    assert parse_yaml("") is None and parse_yaml(json.dumps({"a": {"b": [None, True]}})) == {"a": {"b": [None, True]}}
