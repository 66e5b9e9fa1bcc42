"""``data get`` against a server on this machine that has the published archives of tiny datasets."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from randlora_pl.data import download as fetch
from randlora_pl.data import install
from randlora_pl.data.catalog import CATALOG, find
from randlora_pl.data.splits import Splits
from tests.data.download.server import Server, md5, serving
from tests.data.readers import BUILDERS
from tests.data.readers.conftest import Copies, Copy, copies, written  # noqa: F401  (fixtures)
from tests.data.readers.packing import published
from tests.support.cli import Refused, Run
from tests.support.products import in_one_item, marked

Publish = Callable[[str], Path]

KINDS = ("mnist", "svhn", "stl10", "pascalvoc", "resisc45", "caltech101")
"""One of each: gzip, no archive, tar with a file to leave, folders of two archives, zip beside lists, and nested."""
FETCHED = [row.name for row in CATALOG.values() if row.download and row.name in BUILDERS]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetch, "PAUSE", 0.001)
    with serving() as served:
        yield served


@pytest.fixture
def publish(copies: Copies, server: Server, monkeypatch: pytest.MonkeyPatch) -> Publish:  # noqa: F811
    """Puts the archives of a dataset on the server, as if its tiny copy were all there is; returns the copy."""
    split_report = install._split

    def lenient(row: Any, split: str, samples: Any, sample: Any, problems: list[str], tick: Any) -> install.SplitReport:
        report = split_report(row, split, samples, sample, problems, tick)
        problems[:] = [each for each in problems if " classes have no " not in each.what]  # so few images are too few
        return report

    monkeypatch.setattr(install, "_split", lenient)

    def put(name: str) -> Path:
        copy = copies(name)
        packed = published(name, copy.root)
        assert sorted(packed) == sorted(file.name for file in copy.row.files)
        server.files |= {f"{name}/{file}": content for file, content in packed.items()}
        files = tuple(
            replace(file, urls=file.urls and (f"{server.url}/{name}/{file.name}",), checksum=md5(packed[file.name]))
            for file in copy.row.files
        )
        monkeypatch.setitem(CATALOG, name, replace(copy.row, files=files, counts=sizes(copy)))
        return copy.root

    return put


def sizes(copy: Copy) -> dict[str, int]:
    found = Splits(copy.read)
    return {split: len(getattr(found, split)) for split in ("train", "val", "test")}


def held(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def names(folder: Path | str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def unread(name: str) -> set[str]:
    """Files of a copy that the published archives do not hold, or that are not unpacked."""
    return {"resisc45": {"resisc45/resisc45-val.txt"}}.get(name, set())


@pytest.mark.parametrize(("name",), marked(zip(FETCHED), lambda row: row[0] in KINDS))
def test_every_fetched_data_set_comes_as_its_reader_expects_it(
    run: Run, publish: Publish, tmp_path: Path, name: str
) -> None:
    source = publish(name)
    result = run("data", "get", name, "--root", "new/sets")
    assert result.code == 0, result.out + result.err
    expected = {path: content for path, content in held(source).items() if path not in unread(name)}
    assert held(tmp_path / "new/sets") == expected
    assert "1 dataset: 1 as expected" in result.out
    assert f"installed: new/sets/{find(name).layout.partition('/')[0]}" in result.out
    assert f"--data.dataset {name} --data.root new/sets" in result.out.splitlines()[-1]
    assert all(f"{file.name}: " in result.out and "its md5 is correct" in result.out for file in find(name).files)


def test_what_is_lacking_is_put_back(run: Run, publish: Publish, tmp_path: Path) -> None:
    source = publish("gtsrb")
    shutil.copytree(source, "sets")
    shutil.rmtree(tmp_path / "sets/gtsrb/GTSRB/Training/00003")
    (tmp_path / "sets/gtsrb/mine.txt").write_text("mine")
    result = run("data", "get", "gtsrb", "--root", "sets")
    assert result.code == 0 and "gtsrb: in sets, but off: " in result.out
    assert held(tmp_path / "sets") == held(source) | {"gtsrb/mine.txt": b"mine"}


def test_archives_are_kept_on_demand_and_used_again(run: Run, publish: Publish, server: Server, tmp_path: Path) -> None:
    publish("eurosat")
    assert "no longer needed: EuroSAT.zip" in run("data", "get", "eurosat", "--root", "sets", "--keep").out
    assert (tmp_path / "sets/downloads/eurosat/EuroSAT.zip").exists()
    shutil.rmtree(tmp_path / "sets/eurosat")
    server.asked.clear()
    result = run("data", "get", "eurosat", "--root", "sets")
    assert result.code == 0 and not server.asked
    assert "EuroSAT.zip: already downloaded, its md5 is correct" in result.out and "0 to download" in result.out
    assert names("sets") == ["eurosat"]
    result = run("data", "get", "eurosat", "--root", "sets")
    assert (result.code, result.out, server.asked) == (0, "eurosat: already complete in sets\n", [])


def test_a_kill_while_unpacking_leaves_nothing_half_made(
    run: Run, publish: Publish, server: Server, tmp_path: Path
) -> None:
    source = publish("eurosat")
    home = tmp_path / "sets/downloads/eurosat"
    home.mkdir(parents=True)
    (home / "EuroSAT.zip").write_bytes(server.files["eurosat/EuroSAT.zip"])
    code = f"""
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from randlora_pl.data import download as archives, install
from randlora_pl.data.catalog import find
add, calls = archives._Meter.add, []
def dying(self, count):
    calls.append(count)
    if len(calls) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, count)
archives._Meter.add = dying
row = find("eurosat")
row = replace(row, files=(replace(row.files[0], checksum={md5(server.files["eurosat/EuroSAT.zip"])!r}),))
install.get(row, Path({str(tmp_path / "sets")!r}), install.DownloadProgress())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert names("sets") == ["downloads"] and len(list(home.rglob("*.jpg"))) > 3
    result = run("data", "get", "eurosat", "--root", "sets")
    assert result.code == 0 and (tmp_path / "sets/downloads/eurosat/EuroSAT.zip").exists()  # it was ours, not fetched
    shutil.rmtree("sets/downloads")
    assert held(tmp_path / "sets") == held(source)


def test_offline_says_what_to_put_where_and_what_is_put_there_is_used(
    run: Run, publish: Publish, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("eurosat")
    row = find("eurosat")
    url = "http://127.0.0.1:1/EuroSAT.zip"
    monkeypatch.setitem(CATALOG, "eurosat", replace(row, files=(replace(row.files[0], urls=(url,)),)))
    result = run("data", "get", "eurosat", "--root", "sets")
    assert result.code == 1
    assert result.err.splitlines() == [
        "randlora-pl: error: eurosat: EuroSAT.zip could not be downloaded: 127.0.0.1:1 cannot be reached "
        "([Errno 111] Connection refused)",
        f"By hand: put into sets/downloads/eurosat: EuroSAT.zip ({url}); "
        "then: randlora-pl data get eurosat --root sets",
    ]
    path = tmp_path / "sets/downloads/eurosat/EuroSAT.zip"
    path.write_bytes(b"a wrong file")
    result = run("data", "get", "eurosat", "--root", "sets")
    assert result.code == 1 and "md5" in result.err and path.exists()
    path.write_bytes(server.files["eurosat/EuroSAT.zip"])
    result = run("data", "get", "eurosat", "--root", "sets")
    assert result.code == 0 and "no longer needed: EuroSAT.zip in sets/downloads/eurosat" in result.out
    assert path.exists()  # it was put there by a person, who may want it


def test_files_that_only_a_person_can_fetch_are_unpacked(
    run: Run, publish: Publish, server: Server, tmp_path: Path
) -> None:
    source = publish("ucf101")
    result = run("data", "get", "ucf101", "--root", "sets")
    assert result.code == 1 and not held(tmp_path / "sets")
    first, second, again = result.out.splitlines()[-3:]
    assert first.startswith("  put UCF-101-midframes.zip into sets/downloads/ucf101: https://drive.google.com/file/d/")
    assert "split_zhou_UCF101.json" in second and again == "  then: randlora-pl data get ucf101 --root sets"
    home = tmp_path / "sets/downloads/ucf101"
    (home / "split_zhou_UCF101.json").write_bytes(server.files["ucf101/split_zhou_UCF101.json"])
    assert "split_zhou" not in run("data", "get", "ucf101", "--root", "sets").out
    (home / "UCF-101-midframes.zip").write_bytes(server.files["ucf101/UCF-101-midframes.zip"])
    assert run("data", "get", "ucf101", "--root", "sets").code == 0
    shutil.rmtree(home.parent)
    assert held(tmp_path / "sets") == held(source)


@pytest.mark.parametrize("name", ["cars", "imagenet"])
def test_sets_that_no_command_can_get_are_explained(run: Run, name: str) -> None:
    result = run("data", "get", name, "--root", "sets")
    assert result.code == 1 and f"{name} cannot be downloaded by a command" in result.out
    folder = {"cars": "sets/stanford_cars", "imagenet": "sets/imagenet"}[name]
    assert folder in result.out and "https://" in result.out and find(name).license in result.out
    assert f"then: randlora-pl data get {name} --root sets" in result.out
    assert not Path("sets").exists()


def test_one_failure_stops_no_other(run: Run, publish: Publish, server: Server) -> None:
    for name in ("mnist", "eurosat", "svhn"):
        publish(name)
    del server.files["eurosat/EuroSAT.zip"]
    result = run("data", "get", "mnist", "digits", "eurosat", "svhn", "--root", "sets")
    assert result.code == 1 and "EuroSAT.zip" in result.err
    assert "digits: built in" in result.out and "2 datasets: 2 as expected" in result.out
    assert result.out.splitlines()[-3] == "Failed: eurosat. Run the same command again to retry"
    assert names("sets") == ["MNIST", "downloads", "svhn"]


def test_all_fetches_what_can_be_fetched(run: Run, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in CATALOG if name not in ("digits", "mnist", "cars", "folder", "pairs")]:
        monkeypatch.delitem(CATALOG, name)
    publish("mnist")
    result = run("data", "get", "--all", "--root", "sets")
    assert result.code == 0  # what only a person can get is no failure
    assert result.out.index("1 as expected") < result.out.index("cars cannot be downloaded by a command")
    assert names("sets") == ["MNIST"]


def test_a_set_that_is_not_as_expected_keeps_its_archives(
    run: Run, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("eurosat")
    row = find("eurosat")
    monkeypatch.setitem(CATALOG, "eurosat", replace(row, counts={"train": 31, "val": 10, "test": 20}))
    result = run("data", "get", "eurosat", "--root", "sets")
    assert result.code == 1 and "30 train images, expected 31" in result.out
    assert Path("sets/downloads/eurosat/EuroSAT.zip").exists()


def test_two_commands_do_not_write_the_same_files_and_what_one_uses_is_not_tidied_away(
    run: Run, publish: Publish
) -> None:
    fcntl = pytest.importorskip("fcntl")
    publish("eurosat")
    Path("sets/downloads/eurosat").mkdir(parents=True)
    with Path("sets/downloads/eurosat/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = run("data", "get", "eurosat", "--root", "sets")
    assert result.code == 1 and "downloading" in result.err
    assert run("data", "get", "eurosat", "--root", "sets", "--keep").code == 0
    with Path("sets/downloads/eurosat/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = run("data", "get", "eurosat", "--root", "sets")
    assert result.code == 0 and "no longer needed: EuroSAT.zip" in result.out
    assert Path("sets/downloads/eurosat/EuroSAT.zip").exists()
    assert run("data", "get", "eurosat", "--root", "sets").code == 0 and names("sets") == ["eurosat"]


def test_a_terminal_shows_a_bar_and_a_log_a_line_now_and_then(
    run: Run, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("eurosat")
    monkeypatch.setattr("randlora_pl.data.install.EVERY", -1.0)
    assert "EuroSAT.zip: downloading, 0 bytes of " in run("data", "get", "eurosat", "--root", "log").out
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    result = run("data", "get", "eurosat", "--root", "a terminal")
    assert result.code == 0 and "downloading" not in result.out and "EuroSAT.zip: downloading" in result.err
    assert result.out.endswith("--data.dataset eurosat --data.root 'a terminal'\n"), "commands to type are quoted"


def test_interrupted_and_with_a_folder_in_the_way(run: Run, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    publish("eurosat")

    monkeypatch.setattr(fetch, "_next", Mock(side_effect=KeyboardInterrupt))
    stopped = run("data", "get", "eurosat", "--root", "a set")
    assert stopped.code == 130 and stopped.err.endswith("data get eurosat --root 'a set'\n")
    Path("sets/downloads/eurosat/EuroSAT.zip").mkdir(parents=True)
    assert "EuroSAT.zip" in run("data", "get", "eurosat", "--root", "sets").err


@in_one_item(
    ("words", "hint"),
    [
        (["get"], "no dataset is named"),
        (["get", "digits", "--all"], "names datasets and --all"),
        (["get", "cifar10", "cifar01"], "'cifar10'"),
        (["get", "folder"], "your own images"),
        (["get", "mnist", "--root", "file"], "--root"),
    ],
)
def test_mistakes(refused: Refused, tmp_path: Path, words: list[str], hint: str) -> None:
    Path("file").touch()
    assert hint in refused("data", *words)
