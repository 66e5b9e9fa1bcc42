import errno
import multiprocessing
import os
import pickle
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest

from randlora_pl.data import image_batches as cache
from randlora_pl.data.image_batches import CachedImages, meeting, room, shared_folder
from randlora_pl.data.sources import FileImages
from randlora_pl.utils.errors import UserError
from tests.data.conftest import save_image
from tests.support.products import marked

ROWS = range(3)


@pytest.fixture
def files(tmp_path: Path) -> FileImages:
    return FileImages([save_image(tmp_path / f"{number}.png", number, (4, 4)) for number in range(4)])


def kept(images: CachedImages) -> int:
    return int(np.count_nonzero(images._table[:, 0]))


def remove(files: FileImages) -> None:
    for path in map(files.path, range(len(files))):
        path.unlink()


def test_decodes_once_and_keeps_its_bound(files: FileImages) -> None:
    expected = [files.load(number) for number in range(4)]
    cached = CachedImages(files, ROWS, limit=2 * 48)
    assert [np.array_equal(cached.load(number), expected[number]) for number in range(4)] == [True] * 4
    assert kept(cached) == 2
    remove(files)
    assert np.array_equal(cached.load(0), expected[0]) and np.array_equal(cached.load(1), expected[1])
    with pytest.raises(UserError, match=r"2.png"):  # beyond the bound: read again
        cached.load(2)
    with pytest.raises(UserError, match=r"3.png"):  # not among the rows
        cached.load(3)
    assert len(cached) == 4 and cached.name(2) == str(files.path(2))


def child(cached: CachedImages, number: int, answer: Connection) -> None:
    answer.send((cached.load(number), kept(cached)))


@pytest.mark.parametrize(("method",), marked(zip(["fork", "spawn", "forkserver"]), lambda row: row[0] in ("fork",)))
def test_worker_processes_share_what_any_of_them_has_decoded(files: FileImages, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system does not know the start method {method}")
    context = multiprocessing.get_context(method)
    cached = CachedImages(files, ROWS)
    expected = [files.load(number) for number in range(3)]
    cached.load(0)

    def in_child(number: int) -> tuple[np.ndarray, int]:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(cached, number, there))
        process.start()
        there.close()
        found: tuple[np.ndarray, int] = here.recv()
        process.join()
        return found

    pixels, kept = in_child(1)
    assert np.array_equal(pixels, expected[1]) and kept == 2
    remove(files)
    assert np.array_equal(cached.load(1), expected[1]), "what a worker decoded is there for the rest"
    pixels, kept = in_child(0)
    assert np.array_equal(pixels, expected[0]) and kept == 2


def test_processes_without_kinship_meet_at_a_path_that_they_give_up(files: FileImages, tmp_path: Path) -> None:
    strategy = MagicMock(broadcast=lambda place: tmp_path / place.name)
    with meeting(strategy) as place:
        assert place is not None and place.is_dir()
        one, two = (CachedImages(files, ROWS, limit=limit, path=place / "0") for limit in (1000, 100))
    assert not place.exists()
    expected = [files.load(number) for number in range(3)]
    one.load(0), two.load(2)
    remove(files)
    assert np.array_equal(two.load(0), expected[0]) and np.array_equal(one.load(2), expected[2])


def test_an_error_at_the_meeting_leaves_nothing(tmp_path: Path) -> None:
    strategy = MagicMock(broadcast=lambda place: tmp_path / place.name)
    with pytest.raises(UserError), meeting(strategy):
        raise UserError("too few images")
    assert list(tmp_path.iterdir()) == []
    with meeting(None) as place:
        assert place is None


def test_a_copy_that_is_no_child_begins_empty(files: FileImages) -> None:
    cached = CachedImages(files, ROWS)
    expected = cached.load(1)
    copy: CachedImages = pickle.loads(pickle.dumps(cached))
    assert kept(copy) == 0 and np.array_equal(copy.load(1), expected)


def test_full_shared_memory_only_stops_the_keeping(files: FileImages, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    cached = CachedImages(files, ROWS)
    assert np.array_equal(cached.load(0), files.load(0)) and np.array_equal(cached.load(1), files.load(1))
    assert kept(cached) == 0


def test_bound_is_a_quarter_of_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: cache.shutil._ntuple_diskusage(10, 2, 8))
    assert room(tmp_path) == 2
    monkeypatch.setattr(cache, "MOST_BYTES", 1)
    assert room(tmp_path) == 1
    monkeypatch.undo()
    assert room(tmp_path / "nowhere") == 0
    assert shared_folder().is_dir()


def test_without_address_space_images_are_decoded_at_each_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", fail)
    images = CachedImages(FileImages([save_image(tmp_path / "a.png")]), [0], limit=1 << 20)
    assert np.array_equal(images.load(0), images.load(0)) and kept(images) == 0
