"""Datasets of scenes, textures, signs and countries, from the ground and from above."""

from randlora_pl.data.catalog import templates as prompts
from randlora_pl.data.catalog.spec import DatasetSpec, archive, counts

_ZOO = "randlora_pl.data.readers.torchvision:torchvision_files"
_RUB = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370"
_EUROSAT = "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd"
_RESISC = "https://huggingface.co/datasets/torchgeo/resisc45/resolve/a826b44d938a883185f11ebe3d512d38b464312f"
_SUN = "https://vision.princeton.edu/projects/2010/SUN"
_COUNTRY_FOLDERS = {"train": "train", "val": "valid", "test": "test"}

ROWS = (
    DatasetSpec(
        name="dtd",
        title="Describable Textures, split 1",
        reader=_ZOO,
        epochs=76,
        licence="research only",
        source="https://www.robots.ox.ac.uk/~vgg/data/dtd",
        classnames=prompts.names("dtd"),
        templates=prompts.TEXTURE,
        counts=counts(3_384, 376, 1_880),
        options={
            "name": "DTD",
            "splits": {"train": ("train", "val"), "test": ("test",)},
            "known": prompts.names("dtd"),
        },
        layout="dtd/dtd/{images/CLASS/*.jpg,labels/{train1,val1,test1}.txt}",
        files=(
            archive(
                "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
                "md5:fff73e5086ae6bdbea199a49dfb8a4c1",
                "dtd",
            ),
        ),
        note="train is the official train and validation part together, as in the paper",
    ),
    DatasetSpec(
        name="eurosat",
        title="EuroSAT (RGB)",
        reader="randlora_pl.data.readers.trees:indexed_tree",
        epochs=12,
        licence="MIT",
        source="https://github.com/phelber/EuroSAT (EuroSAT.zip, RGB)",
        classnames=prompts.names("eurosat"),
        templates=prompts.SATELLITE,
        counts=counts(21_600, 2_700, 2_700),
        options={"folder": "eurosat/2750", "known": prompts.folders("eurosat"), "index": "eurosat"},
        layout="eurosat/2750/CLASS/CLASS_N.jpg",
        files=(archive(f"{_EUROSAT}/EuroSAT.zip", "md5:c8fa014336c82ac7804f0398fcb19387", "eurosat"),),
        note="the paper's split was never published: 270 validation and 270 test images of each class by a fixed index",
    ),
    DatasetSpec(
        name="gtsrb",
        title="German Traffic Signs (GTSRB)",
        reader=_ZOO,
        epochs=11,
        licence="free to use, with citation",
        source="https://benchmark.ini.rub.de/gtsrb_news.html (the archive Training_fixed, 26,640 images)",
        classnames=prompts.names("gtsrb"),
        templates=prompts.SIGN,
        counts=counts(23_976, 2_664, 12_630),
        options={"name": "GTSRB", "splits": {"train": ("train",), "test": ("test",)}, "numbered": ("train",)},
        layout="gtsrb/{GTSRB/Training/NNNNN/*.ppm,GTSRB/Final_Test/Images/*.ppm,GT-final_test.csv}",
        files=(
            archive(f"{_RUB}/GTSRB-Training_fixed.zip", "md5:513f3c79a4c5141765e10e952eaa2478", "gtsrb"),
            archive(f"{_RUB}/GTSRB_Final_Test_Images.zip", "md5:c7e4e6327067d32654124b0fe9e82185", "gtsrb"),
            archive(f"{_RUB}/GTSRB_Final_Test_GT.zip", "md5:fe31e9c9270bbcd7b84b7f21a9d9d9e5", "gtsrb"),
        ),
        flip=False,
        note="the official code flips signs too: --data.flip true",
    ),
    DatasetSpec(
        name="resisc45",
        title="NWPU-RESISC45",
        reader="randlora_pl.data.readers.lists:resisc45",
        epochs=15,
        licence="CC BY-NC 4.0, as torchgeo's copy says",
        source="https://gcheng-nwpu.github.io (images), https://huggingface.co/datasets/torchgeo/resisc45 (lists)",
        classnames=prompts.spaced("resisc45"),
        templates=prompts.OVERHEAD,
        counts=counts(17_010, 1_890, 6_300),
        options={"known": prompts.names("resisc45")},
        layout="resisc45/{resisc45-train.txt,resisc45-test.txt,NWPU-RESISC45/CLASS/*.jpg}",
        files=(
            archive(f"{_RESISC}/NWPU-RESISC45.zip", "md5:75206b2e16446591afa88e2628744886", "resisc45"),
            archive(f"{_RESISC}/resisc45-train.txt", "md5:b5a4c05a37de15e4ca886696a85c403e", "resisc45"),
            archive(f"{_RESISC}/resisc45-test.txt", "md5:3dda9e4988b47eb1de9f07993653eb08", "resisc45"),
        ),
        note="the published validation list is not used, as in the paper",
    ),
    DatasetSpec(
        name="sun397",
        title="SUN397, partition 1",
        reader="randlora_pl.data.readers.lists:sun397",
        epochs=14,
        licence="research only",
        source="https://vision.princeton.edu/projects/2010/SUN (SUN397.tar.gz and Partitions.zip)",
        class_count=397,
        templates=prompts.PHOTOS,
        counts=counts(17_865, 1_985, 19_850),
        layout="SUN397/{ClassName.txt,Training_01.txt,Testing_01.txt,a/abbey/*.jpg ...}",
        files=(
            archive(
                f"{_SUN}/SUN397.tar.gz",
                "md5:8ca2778205c41d23104230ba66911c7a",
                page="the site answers 404 since 2025; a copy: https://opendatalab.com/OpenDataLab/SUN397",
            ),
            archive(
                f"{_SUN}/download/Partitions.zip",
                "sha256:e3311ea5f812d4cc6faef194688343d1111f6cd6f70f2c62f393c2b8d6ba1ec9",
                "SUN397",
                page="the site answers 404 since 2025; see https://github.com/pytorch/vision/issues/9348",
            ),
        ),
    ),
    DatasetSpec(
        name="country211",
        title="Country211",
        reader="randlora_pl.data.readers.trees:class_tree",
        epochs=15,
        licence="Creative Commons, by image (YFCC100M)",
        source="https://openaipublic.azureedge.net/clip/data/country211.tgz",
        classnames=prompts.names("country211"),
        templates=prompts.COUNTRY,
        counts=counts(31_650, 10_550, 21_100),
        options={
            "folders": {split: f"country211/{name}" for split, name in _COUNTRY_FOLDERS.items()},
            "known": prompts.folders("country211"),
        },
        layout="country211/{train,valid,test}/CODE/*.jpg",
        files=(
            archive(
                "https://openaipublic.azureedge.net/clip/data/country211.tgz", "md5:84988d7644798601126c29e9877aab6a"
            ),
        ),
        note="its own validation split",
    ),
)
