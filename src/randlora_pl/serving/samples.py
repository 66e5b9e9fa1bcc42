"""Sample images that the page offers for a try.

They are public to everyone who reaches the server. So they come from a folder that the operator names, or from a
dataset that an installed package ships; images of any other dataset stay where they are.
"""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from PIL import Image

from randlora_pl.data.catalog.registry import CATALOG, dataset_path, present
from randlora_pl.serving.uploads import Limits, check_header
from randlora_pl.utils.errors import UserError

COUNT = 10
"""Maximum number of samples."""


def read_samples(folder: Path | None, metadata: Mapping[str, Any], limits: Limits) -> dict[str, bytes]:
    """Return image files by name, at most `COUNT`.

    Args:
        folder: Folder of images; None for images of the dataset in the metadata.
        metadata: Metadata of the adapter.
        limits: Limits of an upload, which hold for samples too.

    Raises:
        UserError: The folder has no images, or one of the chosen images exceeds the limits or is damaged.
    """
    if folder is None:
        return _of_package(str(metadata.get("training", {}).get("dataset", "")))
    from randlora_pl.data.unlabelled import find_images

    files = find_images([folder])
    chosen = [files[number * len(files) // COUNT] for number in range(COUNT)] if len(files) > COUNT else files
    return {_name(f"{number}-{file.name}"): _read(file, limits) for number, file in enumerate(chosen, 1)}


def _read(file: Path, limits: Limits) -> bytes:
    try:
        content = file.read_bytes()
        check_header(content, limits)
    except OSError as error:
        raise UserError(f"The sample {file} cannot be read: {error.strerror}.") from error
    except HTTPException as error:
        raise UserError(f"The sample {file} cannot be offered: {error.detail}.") from error
    if len(content) > limits.upload_bytes:
        raise UserError(f"The sample {file} has {len(content):,} bytes; the limit is {limits.upload_bytes:,}.")
    return content


def _of_package(dataset: str) -> dict[str, bytes]:
    """Return one test image of each class of a dataset that needs no files; nothing for other datasets."""
    row = CATALOG.get(dataset)
    if row is None or dataset_path(row, Path()) is not None or not present(row, Path()):
        return {}
    import numpy as np

    from randlora_pl.data.readers.dispatch import read
    from randlora_pl.data.sampling.splits import Splits

    test = Splits(lambda split: read(row, Path(), split)).test
    labels, first = np.unique(test.labels, return_index=True)
    found = {}
    for label, index in list(zip(labels.tolist(), first.tolist(), strict=True))[:COUNT]:
        file = io.BytesIO()
        Image.fromarray(test.images.load(int(test.rows[index])).squeeze()).save(file, "PNG")
        found[_name(f"{test.classes[label]}.png")] = file.getvalue()
    return found


def _name(text: str) -> str:
    """Return a name that needs no quotes in a URL or a shell."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)
