"""Shards behind URLs, from a server of this machine."""

import copy
import os
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from randlora_pl.data import ImageData
from randlora_pl.data.image_batches import EvalBatches
from randlora_pl.data.loader import EvalSchedule, Loader
from randlora_pl.data.locations import root_of
from randlora_pl.data.readers import tar_shards as tars
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec
from tests.data.download.server import Server, serving
from tests.data.readers.conftest import pixels, samples_in
from tests.data.readers.own.tars import write_shards, write_tar

must = partial(samples_in, "webdataset")


@pytest.fixture
def server(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    monkeypatch.setenv("RANDLORA_PL_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(tars.time, "sleep", lambda seconds: None)
    with serving(tmp_path) as served:
        yield served


def test_images_are_read_by_range(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, 12, each=4)
    expected = must(tmp_path)
    root = f"{server.url}/train-{{000000..000002}}.tar"
    samples = must(root)
    assert samples.keys == expected.keys and samples.labels.tolist() == expected.labels.tolist()
    server.asked.clear()
    assert pixels(samples) == pixels(expected)
    assert len(server.ranges_asked()) == 12 and all(asked.startswith("bytes=") for asked in server.ranges_asked())
    assert samples.images.name(5) == f"{server.url}/train-000001.tar:000005.png"
    server.asked.clear()
    monkeypatch.setattr(tars, "scan", None)  # the index is stored, however small
    assert must(root).keys == expected.keys and not server.ranges_asked()


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_have_their_own_connections(server: Server, tmp_path: Path, workers: int) -> None:
    write_shards(tmp_path, 12, each=4)
    (tmp_path / "list.txt").write_text(f"train-000000.tar\n{server.url}/train-{{000001..000002}}.tar\n")
    samples = must(tmp_path / "list.txt")
    assert len(pixels(samples)) == 12  # this process has connections before it forks
    here, there = (
        list(Loader(EvalBatches(each, EvalSchedule(12, 5), ImageSpec(8)), 0, workers))
        for each in (must(tmp_path), samples)
    )
    assert all(bool((one["image"] == other["image"]).all()) for one, other in zip(here, there, strict=True))


def test_a_changed_shard_is_indexed_anew(server: Server, tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, 4)
    assert len(must(f"{server.url}/train-000000.tar")) == 4
    size = path.stat().st_size
    path.write_bytes(path.read_bytes().replace(b"000003.png", b"zzzzzz.png").replace(b"000003.cls", b"zzzzzz.cls"))
    os.utime(path, ns=(1, 1))
    assert path.stat().st_size == size
    with pytest.raises(UserError, match="damaged"):  # the checksums of the headers are the old ones
        must(f"{server.url}/train-000000.tar")
    write_tar(path, ("a.png", b""), ("a.cls", "0"))
    assert list(must(f"{server.url}/train-000000.tar").keys) == ["a.png"]


def test_without_marks_no_index_is_kept(server: Server, tmp_path: Path) -> None:
    """Another shard of the same size could not be told from the first."""
    server.marks = False
    for labels in ("01", "10"):
        write_tar(tmp_path / "0.tar", ("a.png", b""), ("a.cls", labels[0]), ("b.png", b""), ("b.cls", labels[1]))
        assert must(f"{server.url}/0.tar").labels.tolist() == [int(label) for label in labels]


def test_urls_are_asked_for_as_they_are_typed(server: Server, tmp_path: Path) -> None:
    write_shards(tmp_path, 4)
    write_shards(tmp_path, 2, prefix="test-")
    typed = f"{server.url}/{{train,test}}-000000.tar?sig=a//train/b"
    root = root_of(typed)
    for each in (root, pickle.loads(pickle.dumps(root)), copy.deepcopy(root)):
        assert str(each) == typed and not each.exists() and len(must(each)) == 4 and len(must(each, "test")) == 2
    paths = {path for _, path, _ in server.asked}
    assert pixels(must(root)) and paths == {f"{split}-000000.tar?sig=a//train/b" for split in ("train", "test")}
    write_tar(tmp_path / "train-000001.tar", ("000000.png", b""), ("000000.cls", "0"))
    samples = must(root_of(f"{server.url}/train-{{000000..000001}}.tar?sig=a/b.c"))
    assert list(samples.keys)[:2] == ["000001.png", "000002.png"] and samples.keys[-1] == "train-000001/000000.png"


def test_a_broken_connection_is_tried_again(server: Server, tmp_path: Path) -> None:
    write_shards(tmp_path, 4)
    samples = must(f"{server.url}/train-000000.tar")
    server.statuses = [503] * 2
    assert len(samples.images.load(0))
    server.statuses = [503] * 3
    with pytest.raises(UserError, match=r"train-000000.tar"):
        samples.images.load(0)


def test_a_server_without_ranges(server: Server, tmp_path: Path) -> None:
    write_shards(tmp_path, 4)
    samples = must(f"{server.url}/train-000000.tar")
    server.ranges = False
    with pytest.raises(UserError, match="range requests"):
        samples.images.load(0)


def test_missing_shards_and_servers(server: Server, tmp_path: Path) -> None:
    write_shards(tmp_path, 4)
    with pytest.raises(UserError, match=r"train-000001.tar"):
        must(f"{server.url}/train-{{000000..000001}}.tar")
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/a.tar"):
        must("http://127.0.0.1:9/a.tar")


def test_the_data_module_takes_urls(server: Server, tmp_path: Path) -> None:
    write_shards(tmp_path, 30)
    data = ImageData(dataset="webdataset", root=f"{server.url}/train-{{000000..000004}}.tar", shots=2, num_workers=0)
    assert str(data.root) == f"{server.url}/train-{{000000..000004}}.tar"
    data.prepare_data()
    data.setup()
    assert len(data.samples("train")) == 6 and len(next(iter(data.test_dataloader()))["label"]) == 6
