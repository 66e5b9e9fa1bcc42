"""A copy of each format, written once a session; torchvision's checksums are those of the copies."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import md5
from pathlib import Path

import pytest
from torchvision import datasets

from randlora_pl.data.catalog import DatasetSpec, find
from randlora_pl.data.readers import Samples, read
from tests.data.readers import BUILDERS
from tests.data.readers.pictures import Made


@dataclass
class Copy:
    """A copy of a dataset and what is known of it."""

    row: DatasetSpec
    root: Path
    made: Made

    def read(self, split: str) -> Samples | None:
        return read(self.row, self.root, split)

    def samples(self, split: str) -> Samples:
        samples = self.read(split)
        assert samples is not None
        return samples


def read_split(name: str, root: Path | str, split: str = "train") -> Samples | None:
    return read(find(name), root if isinstance(root, Path) else Path(root), split)


def samples_in(name: str, root: Path | str, split: str = "train") -> Samples:
    samples = read_split(name, root, split)
    assert samples is not None
    return samples


def pixels(samples: Samples) -> list[bytes]:
    return [samples.images.load(row).tobytes() for row in samples.rows.tolist()]


Copies = Callable[[str], Copy]

_FOUND: dict[str, Copy] = {}  # outside the fixture, of which each test file that imports it has its own


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Copies:
    """The copy of a dataset; it is shared, and not to be changed."""

    def get(name: str) -> Copy:
        if name not in _FOUND:
            root = tmp_path_factory.mktemp(name)
            _FOUND[name] = Copy(find(name), root, BUILDERS[name](root))
        return _FOUND[name]

    return get


@pytest.fixture
def copies(written: Copies, monkeypatch: pytest.MonkeyPatch) -> Copies:
    """As `written`, with torchvision told the checksums."""

    def get(name: str) -> Copy:
        copy = written(name)
        allow(copy, monkeypatch)
        return copy

    return get


@pytest.fixture
def own_copy(copies: Copies, tmp_path: Path) -> Copies:
    """A copy that the test may damage."""

    def get(name: str) -> Copy:
        shared = copies(name)
        return Copy(shared.row, Path(shutil.copytree(shared.root, tmp_path / name)), shared.made)

    return get


def allow(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the checksums of a copy in the place of the real ones, which torchvision wants to see."""
    sums = {path: md5((copy.root / path).read_bytes()).hexdigest() for path in copy.made.checksums}
    named = {Path(path).name: found for path, found in sums.items()}
    if copy.row.name in ("cifar10", "cifar100"):
        kind = getattr(datasets, copy.row.options["name"])
        for attribute in ("train_list", "test_list"):
            monkeypatch.setattr(kind, attribute, [[name, named[name]] for name, _ in getattr(kind, attribute)])
        monkeypatch.setattr(kind, "meta", kind.meta | {"md5": named[kind.meta["filename"]]})
    elif copy.row.name == "stl10":
        unread = ["unlabeled_X.bin", "0" * 32]
        kept = [[name, named[name]] for name in ("train_X.bin", "train_y.bin")]
        monkeypatch.setattr(datasets.STL10, "train_list", [*kept, unread])
        monkeypatch.setattr(datasets.STL10, "test_list", [[n, named[n]] for n in ("test_X.bin", "test_y.bin")])
    elif copy.row.name == "svhn":
        lists = {split: ["", f"{split}_32x32.mat", named[f"{split}_32x32.mat"]] for split in ("train", "test")}
        monkeypatch.setattr(datasets.SVHN, "split_list", lists)
    elif copy.row.name == "flowers102":
        files = {key: (file, named.get(file, "")) for key, (file, _) in datasets.Flowers102._file_dict.items()}
        monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)
