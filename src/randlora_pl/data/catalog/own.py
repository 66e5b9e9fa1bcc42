"""Datasets from the user's own images."""

from randlora_pl.data.catalog import templates as prompts
from randlora_pl.data.catalog.spec import DatasetSpec

ROWS = (
    DatasetSpec(
        name="folder",
        title="Your own folder of images, a sub-folder for each class",
        reader="randlora_pl.data.readers.own.folder:folder",
        epochs=10,
        licence="yours",
        source="--data.root FOLDER",
        layout="CLASS/IMAGE, or train/CLASS/IMAGE with val/ and test/ beside it",
        own=True,
        note="without test/ and val/: 20 % and 10 % are set aside, stratified",
    ),
    DatasetSpec(
        name="table",
        title="Your own table of images and classes: CSV, TSV or Parquet",
        reader="randlora_pl.data.readers.own.table:table",
        epochs=10,
        licence="yours",
        source="--data.root FILE.csv",
        layout="a CSV, TSV or Parquet file with the columns path,label[,split]; paths are relative to it",
        own=True,
        note="without splits 20 % and 10 % are set aside for test and val, stratified",
    ),
    DatasetSpec(
        name="hf",
        title="Your own Hugging Face dataset in a folder",
        reader="randlora_pl.data.readers.own.huggingface:hub",
        epochs=10,
        licence="yours",
        source="--data.root FOLDER",
        layout="a folder of Dataset.save_to_disk, or of Parquet files such as train-00000-of-00001.parquet",
        own=True,
        note='needs the package datasets: pip install "randlora-pl[hf]"',
    ),
    DatasetSpec(
        name="pairs",
        title="Your own images with captions, for retrieval",
        reader="randlora_pl.data.readers.own.caption_pairs:pairs",
        epochs=10,
        licence="yours",
        source="--data.root FILE.csv",
        templates=prompts.CAPTION,
        layout="a CSV, TSV or Parquet file with the columns image,caption[,split]; paths are relative to it",
        flip=False,  # captions may say left and right
        own=True,
        captions=True,
        note="several captions for one image: several lines",
    ),
    DatasetSpec(
        name="webdataset",
        title="Your own tar shards (WebDataset)",
        reader="randlora_pl.data.readers.own.tar_shards:shards",
        epochs=10,
        licence="yours",
        source="--data.root SHARDS",
        layout="a folder of .tar files, a pattern such as train-{000..099}.tar, or a text file that lists them",
        own=True,
        patterns=True,
        note="an image and its .cls or .json a sample; classnames.txt and templates.txt may lie beside the shards",
    ),
)
