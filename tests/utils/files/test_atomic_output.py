"""Files and folders appear whole or not at all, with the permissions of any other."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import (
    atomic_file,
    atomic_folder,
    disk_errors,
    move,
    remove_leftovers,
    scratch_folder,
    write_bytes,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_of_any_other(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_bytes(tmp_path / "made" / "file", b"content")
        (tmp_path / "other").write_bytes(b"content")
        assert os.umask(mask) == mask, "the umask stays"
    finally:
        os.umask(before)
    file = tmp_path / "made" / "file"
    assert file.read_bytes() == b"content"
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o666 & ~mask


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
