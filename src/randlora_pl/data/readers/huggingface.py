"""User's Hugging Face datasets on disk: from ``save_to_disk``, or the Hub's Parquet files.

The package ``datasets`` maps the files into memory; the network is not used, and nothing is written beside the data
(Parquet files are converted once in the package's cache). Images are decoded like all others.
"""

import logging
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from randlora_pl.data.catalog import DatasetSpec
from randlora_pl.data.readers import SPLIT_OF, Samples, class_order, in_key_order, numbered, source_split
from randlora_pl.data.sources import SKIP, EncodedImages, decode
from randlora_pl.utils.errors import UnreadableImageError, UserError, first_line
from randlora_pl.utils.files import parse_json

log = logging.getLogger("randlora_pl")


@dataclass(frozen=True)
class HubImages(EncodedImages):
    """Encoded images of one split.

    Attributes:
        data: `datasets.Dataset` with only the image column; it is pickled as its file names.
        title: Name of the split for messages.
        home: Folder of images stored as relative paths.
    """

    data: Any
    title: str
    home: Path

    def __len__(self) -> int:
        return len(self.data)

    def load(self, index: int, short: int = 0) -> NDArray[np.uint8]:
        """Decode image ``index`` to RGB (see `decode`).

        Raises:
            UserError: The image is missing, truncated or not an image; the message names it.
        """
        (cell,) = self.data[index].values()
        cell = cell or {}
        name = Path(f"{self.name(index)}{' (' + cell['path'] + ')' if cell.get('path') else ''}")
        how: dict[str, Any] = {"most_pixels": self.most_pixels, "background": self.background}
        if cell.get("bytes") is not None:
            return decode(name, short, cell["bytes"], **how)
        if cell.get("path"):
            return decode(self.home / cell["path"], short, **how)
        raise UnreadableImageError(f"The image {name} is empty.", SKIP, str(name))

    def suffix(self, index: int) -> str:
        """Return the suffix of the stored path."""
        (cell,) = self.data[index].values()
        return Path((cell or {}).get("path") or "").suffix.lower()

    def name(self, index: int) -> str:
        """Return the split and the row number."""
        return f"{self.title}, row {index}"


def hub(row: DatasetSpec, root: Path, split: str) -> Samples | None:
    """Read one split of a folder of Hugging Face ``datasets``.

    Classes are those with images in the train split: names of the ``ClassLabel`` in its order, or the distinct labels
    in `class_order`. Keys are ``SPLIT/NUMBER``. A split without labels is ignored. Without ``test``, ``val`` is used
    as ``test``, as in folders.

    Raises:
        UserError: The package is missing; the folder has another layout, is damaged or incomplete, or has no train
            split; or the image or label column is ambiguous.
    """
    del row
    try:
        from datasets import Image, disable_progress_bars
    except ImportError as error:
        how = 'pip install ".[hf]" in the checkout'
        raise UserError(f"--data.dataset hf needs the package datasets ({error}): {how}") from error
    if not sys.stderr.isatty():
        disable_progress_bars()
    labels: dict[str, list[str]] = {}
    names_of: dict[str, list[str] | None] = {}
    data: dict[str, Any] = {}
    for name, home in _splits(root).items():
        read = load_split(root, home)
        labels[name], names_of[name] = _labels(root, name, read)
        if any(labels[name]):
            data[name] = read
        else:
            log.warning("%s: the split %r has no labels and is ignored", root, name)
    source = source_split(split, data, root)
    if source is None:
        return None
    there = set(labels["train"])
    named = names_of["train"]
    classes = class_order(there, root) if named is None else [name for name in named if name in there]
    title = f"{root}, split {source!r}"
    numbers = numbered(labels[source], classes, lambda index: f"{title}, row {index}")
    # the feature ``Image``, or the same two fields
    kinds = {name: set(kind) if isinstance(kind, dict) else type(kind) for name, kind in data[source].features.items()}
    possible = [name for name, kind in kinds.items() if kind in (Image, {"bytes", "path"})]
    if len(possible) != 1:
        what, change = f"the columns {', '.join(possible)} have images; keep one of them", 'remove_columns(["NAME"])'
        if not possible:
            what = f"none of the columns {', '.join(kinds)} has images. If one has paths"
            change = 'cast_column("NAME", datasets.Image())'
        raise UserError(f'{root}: {what}: dataset.{change}.save_to_disk("FOLDER")')
    column = possible[0]
    images = data[source].select_columns([column])
    if isinstance(images.features[column], Image):
        images = images.cast_column(column, Image(decode=False))
    keys = [f"{source}/{number:08d}" for number in range(len(images))]
    return in_key_order(HubImages(images, title, root), numbers, keys, classes)


def _splits(root: Path) -> dict[str, Path | list[Path]]:
    saved = root / "dataset_dict.json"
    sources: Mapping[str, Path | list[Path]]
    if saved.is_file():
        try:
            sources = {str(name): root / str(name) for name in parse_json(saved.read_text(encoding="utf-8"))["splits"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{saved} is damaged ({error}). Save the dataset again") from error
    elif (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
        return {"train": root}
    else:
        sources = _parquet_files(root)
        if len(sources) == 1 and not SPLIT_OF.keys() & {name.lower() for name in sources}:
            return {"train": next(iter(sources.values()))}
    used: dict[str, Path | list[Path]] = {}
    for name, home in sources.items():
        split = SPLIT_OF.get(name.lower())
        if split is None:
            log.warning("%s: the split %r is not train, validation or test and is ignored", root, name)
        elif split in used:
            raise UserError(f"{root}: two splits are named like {split!r}; keep one of them ({', '.join(sources)})")
        else:
            used[split] = home
    return used


def _parquet_files(root: Path) -> dict[str, list[Path]]:
    """Return the Parquet files per split: ``SPLIT-00000-of-00002.parquet``, ``SPLIT.parquet``, ``SPLIT/0000.parquet``.

    All must be there, and in one folder.
    """
    files: dict[str, list[Path]] = defaultdict(list)
    expected: dict[str, int] = {}
    homes = set()
    for path in sorted(root.rglob("*.parquet")):
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        shard = re.fullmatch(r"(.+?)-\d+-of-(\d+)(-.*)?", path.stem)
        name, home = shard[1] if shard else path.stem, path.parent
        if name.lower() not in SPLIT_OF and home != root and home.name.lower() in SPLIT_OF:
            name, home = home.name, home.parent
        files[name].append(path)
        homes.add(str(home))
        if shard:
            expected[name] = int(shard[2])
        with path.open("rb") as stream:
            start = stream.read(8)
        if start[:4] != b"PAR1":
            hint = "a pointer of Git LFS; fetch it: git lfs pull" if start == b"version " else "download it again"
            raise UserError(f"{path} is not a Parquet file ({hint})")
    if not files:
        what = "has no dataset" if root.is_dir() else "is a file" if root.exists() else "does not exist"
        raise UserError(
            f"The data folder {root} {what}; expected a folder of Dataset.save_to_disk, or of Parquet files such as "
            "data/train-00000-of-00001.parquet. Set it with --data.root FOLDER"
        )
    if len(homes) > 1:
        some = ", ".join(sorted(homes)[:5])
        raise UserError(f"{root} has {len(homes)} folders of Parquet files. Set one with --data.root: {some}")
    for name, count in expected.items():
        if count != len(files[name]):
            there = f"{len(files[name])} of {count} files of the split {name!r} exist"
            raise UserError(f"{root}: {there}; download the others")
    return files


def load_split(root: Path, home: Path | list[Path]) -> Any:
    """Load one split as a `datasets.Dataset`, mapped into memory: a saved folder, or Parquet files."""
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as error:
        raise UserError(f'{root} needs datasets ({error}): pip install ".[hf]" in the checkout') from error
    try:
        if isinstance(home, Path):
            return load_from_disk(str(home))
        return Dataset.from_parquet([str(path) for path in home])
    except Exception as error:  # it raises OSError, ValueError, KeyError, pyarrow's and its own errors
        where = home if isinstance(home, Path) else root
        reason = first_line(error.__cause__ or error)
        raise UserError(f"The dataset in {where} cannot be read ({reason}). Save or download it again") from error


def _labels(root: Path, split: str, data: Any) -> tuple[list[str], list[str] | None]:
    """Return the label of each sample, and the names of a ``ClassLabel``."""
    from datasets import ClassLabel, Value

    kinds = data.features.items()
    named = [name for name, feature in kinds if isinstance(feature, ClassLabel)]
    possible = named or [name for name, feature in kinds if isinstance(feature, Value)]
    usual = ("label", "labels", "fine_label", "class", "target")  # in order of preference
    column = named[0] if len(named) == 1 else next((name for name in usual if name in possible), None)
    if column is None:
        raise UserError(
            f"{root}: the label column is ambiguous among {', '.join(data.features)}. "
            'Name it "label": dataset.rename_column("NAME", "label").save_to_disk("FOLDER")'
        )
    values = data.select_columns([column])[:][column]
    names: list[str] | None = getattr(data.features[column], "names", None)
    if names is None:
        texts = ["" if value is None else str(value).strip() for value in values]
    else:  # the Hub stores -1 for hidden labels
        texts = ["" if value is None or value < 0 else names[value] for value in values]
    if "" in texts and (any(texts) or split == "train"):
        raise UserError(f"{root}, split {split!r}, row {texts.index('')}: the label ({column!r}) is empty")
    return texts, names
