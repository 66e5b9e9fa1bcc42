import errno
import os
import stat
from pathlib import Path

import pytest

from randlora_pl.utils.files.cache_folder import write_atomic


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_of_any_other(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "made" / "file", lambda stream: stream.write(b"content"))
        (tmp_path / "other").write_bytes(b"content")
        assert os.umask(mask) == mask, "the umask stays"
    finally:
        os.umask(before)
    file = tmp_path / "made" / "file"
    assert file.read_bytes() == b"content"
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o666 & ~mask


def test_a_write_that_fails_leaves_the_older_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"older")

    def fail(stream: object) -> None:
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        write_atomic(file, fail)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert file.read_bytes() == b"older"


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def fail(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as raised:
        write_atomic(tmp_path / "a", fail)
    assert raised.value.filename == str(tmp_path / "a")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a", "old")]
