"""Datasets from the user's own images."""

from typing import Any

from randlora_pl.data.catalog import templates as prompts
from randlora_pl.data.catalog.spec import DatasetSpec


def _own(name: str, title: str, reader: str, root: str, **more: Any) -> DatasetSpec:
    reader = f"randlora_pl.data.readers.own.{reader}"
    return DatasetSpec(name, title, reader, 10, "yours", f"--data.root {root}", own=True, **more)


ROWS = (
    _own(
        "folder",
        "Your own folder of images, a sub-folder for each class",
        "folder:folder",
        "FOLDER",
        layout="CLASS/IMAGE, or train/CLASS/IMAGE with val/ and test/ beside it",
        note="without test/ and val/: 20 % and 10 % are set aside, stratified",
    ),
    _own(
        "table",
        "Your own table of images and classes: CSV, TSV or Parquet",
        "table:table",
        "FILE.csv",
        layout="a CSV, TSV or Parquet file with the columns path,label[,split]; paths are relative to it",
        note="without splits 20 % and 10 % are set aside for test and val, stratified",
    ),
    _own(
        "hf",
        "Your own Hugging Face dataset in a folder",
        "huggingface:hub",
        "FOLDER",
        layout="a folder of Dataset.save_to_disk, or of Parquet files such as train-00000-of-00001.parquet",
        note='needs the package datasets: pip install ".[hf]" in the checkout',
    ),
    _own(
        "pairs",
        "Your own images with captions, for retrieval",
        "table:pairs",
        "FILE.csv",
        templates=prompts.CAPTION,
        layout="a CSV, TSV or Parquet file with the columns image,caption[,split]; paths are relative to it",
        flip=False,  # captions may say left and right
        captions=True,
        note="several captions for one image: several lines",
    ),
    _own(
        "webdataset",
        "Your own tar shards (WebDataset)",
        "tar_shards:shards",
        "SHARDS",
        layout="a folder of .tar files, a pattern such as train-{000..099}.tar, or a text file that lists them",
        patterns=True,
        note="a sample is an image and its .cls or .json; classnames.txt and templates.txt are optional",
    ),
)
