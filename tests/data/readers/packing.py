"""The archives in which the datasets are published, made of the copies: same names, same paths inside."""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

Entries = Iterable[tuple[str, bytes]]

# Archive: (folder below the root that its paths are relative to, what it holds of that folder).
CONTENT: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "cifar10": {"cifar-10-python.tar.gz": ("", ("cifar-10-batches-py",))},
    "cifar100": {"cifar-100-python.tar.gz": ("", ("cifar-100-python",))},
    "stl10": {"stl10_binary.tar.gz": ("", ("stl10_binary",))},
    "svhn": {f"{split}_32x32.mat": ("svhn", (f"{split}_32x32.mat",)) for split in ("train", "test")},
    "food101": {"food-101.tar.gz": ("", ("food-101",))},
    "fgvcaircraft": {"fgvc-aircraft-2013b.tar.gz": ("", ("fgvc-aircraft-2013b",))},
    "flowers102": {
        "102flowers.tgz": ("flowers-102", ("jpg",)),
        "imagelabels.mat": ("flowers-102", ("imagelabels.mat",)),
        "setid.mat": ("flowers-102", ("setid.mat",)),
    },
    "oxfordpets": {f"{part}.tar.gz": ("oxford-iiit-pet", (part,)) for part in ("images", "annotations")},
    "cub200": {"CUB_200_2011.tgz": ("", ("CUB_200_2011",))},
    "caltech101": {"101_ObjectCategories.tar.gz": ("caltech101", ("101_ObjectCategories",))},
    "caltech256": {"256_ObjectCategories.tar": ("caltech256", ("256_ObjectCategories",))},
    "ucf101": {
        "UCF-101-midframes.zip": ("ucf101", ("UCF-101-midframes",)),
        "split_zhou_UCF101.json": ("ucf101", ("split_zhou_UCF101.json",)),
    },
    "dtd": {"dtd-r1.0.1.tar.gz": ("dtd", ("dtd",))},
    "eurosat": {"EuroSAT.zip": ("eurosat", ("2750",))},
    "gtsrb": {
        "GTSRB-Training_fixed.zip": ("gtsrb", ("GTSRB/Training",)),
        "GTSRB_Final_Test_Images.zip": ("gtsrb", ("GTSRB/Final_Test",)),
        "GTSRB_Final_Test_GT.zip": ("gtsrb", ("GT-final_test.csv",)),
    },
    "resisc45": {
        "NWPU-RESISC45.zip": ("resisc45", ("NWPU-RESISC45",)),
        "resisc45-train.txt": ("resisc45", ("resisc45-train.txt",)),
        "resisc45-test.txt": ("resisc45", ("resisc45-test.txt",)),
    },
    "country211": {"country211.tgz": ("", ("country211",))},
}

# What lies in the published archives beside the dataset, or is read by nobody here.
BESIDE: dict[str, list[tuple[str, bytes]]] = {
    "stl10_binary.tar.gz": [("stl10_binary/unlabeled_X.bin", b"2.8 GB of it")],
    "CUB_200_2011.tgz": [("attributes.txt", b"1 has_bill_shape::curved\n"), ("./._attributes.txt", b"Mac")],
    "annotations.tar.gz": [("annotations/._trimaps", b"Mac")],
}


def published(name: str, root: Path) -> dict[str, bytes]:
    """The archives of a dataset by their file names.

    Args:
        name: The dataset.
        root: Where its copy is.
    """
    if name in ("mnist", "fashion_mnist"):
        return {f"{path.name}.gz": gzip.compress(path.read_bytes()) for path in sorted(root.glob("*/raw/*"))}
    if name == "sun397":
        return _sun397(root)
    if name == "pascalvoc":
        return _pascalvoc(root)
    packed = {}
    for archive, (base, parts) in CONTENT[name].items():
        packed[archive] = _pack(archive, [*_entries(root / base, parts), *BESIDE.get(archive, ())])
    if name == "caltech101":  # an archive of archives
        inner = [(f"caltech-101/{archive}", content) for archive, content in packed.items()]
        beside = [("caltech-101/Annotations.tar", b"not read"), ("__MACOSX/caltech-101/._Annotations.tar", b"Mac")]
        return {"caltech-101.zip": _pack("caltech-101.zip", [*inner, *beside])}
    return packed


def _sun397(root: Path) -> dict[str, bytes]:
    lists = ("Training_01.txt", "Testing_01.txt")
    images = [(path, content) for path, content in _entries(root, ("SUN397",)) if not path.endswith(lists)]
    partitions = _entries(root / "SUN397", ("ClassName.txt", *lists))
    return {
        "SUN397.tar.gz": _pack("SUN397.tar.gz", images),
        "Partitions.zip": _pack("Partitions.zip", partitions),
    }


def _pascalvoc(root: Path) -> dict[str, bytes]:
    """Both archives have the same folders; which image is whose is in the lists."""
    home = root / "VOCdevkit/VOC2007"
    test = set((home / "ImageSets/Main/test.txt").read_text().split())
    parts: dict[bool, list[tuple[str, bytes]]] = {True: [], False: []}
    for path, content in _entries(root, ("VOCdevkit",)):
        parts[Path(path).stem in test or path.endswith("test.txt")].append((path, content))
    return {f"{name}_06-Nov-2007.tar": _pack("x.tar", parts[name == "VOCtest"]) for name in ("VOCtrainval", "VOCtest")}


def _entries(base: Path, parts: Iterable[str]) -> Entries:
    for part in parts:
        paths = [base / part] if (base / part).is_file() else sorted((base / part).rglob("*"))
        yield from ((path.relative_to(base).as_posix(), path.read_bytes()) for path in paths if path.is_file())


def _pack(archive: str, entries: Entries) -> bytes:
    packed = io.BytesIO()
    if archive.endswith(".zip"):
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
            for path, content in entries:
                target.writestr(path, content)
    elif archive.endswith((".tar", ".tar.gz", ".tgz")):
        kind = "w" if archive.endswith(".tar") else "w:gz"
        with tarfile.open(fileobj=packed, mode=kind, format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
            for path, content in entries:
                info = tarfile.TarInfo(path)
                info.size = len(content)
                info.pax_headers = {"comment": "as some have"}
                tar.addfile(info, io.BytesIO(content))
    else:
        ((_, content),) = entries
        packed.write(content)
    return packed.getvalue()
