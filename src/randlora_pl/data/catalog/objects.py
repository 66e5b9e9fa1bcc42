"""Datasets of objects and actions: ImageNet, Caltech, Pascal VOC, UCF101."""

from randlora_pl.data.catalog import templates as prompts
from randlora_pl.data.catalog.spec import Archive, DatasetSpec, archive, counts

_VOC = "https://thor.robots.ox.ac.uk/pascal/VOC/voc2007"
_DRIVE = "https://drive.google.com/file/d"

ROWS = (
    DatasetSpec(
        name="imagenet",
        title="ImageNet (ILSVRC 2012)",
        reader="randlora_pl.data.readers.trees:class_tree",
        epochs=10,
        licence="non-commercial research and education, after registration",
        source="https://image-net.org/download-images.php",
        classnames=prompts.IMAGENET,
        class_count=1000,
        templates=prompts.IMAGENET_TEMPLATES,
        counts=counts(1_276_167, 5_000, 50_000),
        options={
            "folders": {"train": "imagenet/train", "test": "imagenet/val"},
            "known": prompts.folders("imagenet"),
        },
        layout="imagenet/{train,val}/WNID/*.JPEG (the validation images sorted into folders too)",
        by_hand=(
            "needs a login: https://image-net.org/download-images.php",
            "put ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz "
            "into {root}/imagenet",
            "let torchvision sort them into train/WNID and val/WNID: cd {root} && python -c "
            '\'import torchvision; [torchvision.datasets.ImageNet("imagenet", s) for s in ("train", "val")]\'',
        ),
        note="class names and prompts are open_clip's, in the order of the folder names",
    ),
    DatasetSpec(
        name="caltech101",
        title="Caltech 101",
        reader="randlora_pl.data.readers.trees:indexed_tree",
        epochs=10,
        licence="CC BY 4.0",
        source="https://data.caltech.edu/records/mzrjq-6wc02",
        classnames=prompts.names("caltech101"),
        templates=prompts.CALTECH,
        counts=counts(6_247, 694, 1_736),
        options={
            "folder": "caltech101/101_ObjectCategories",
            "index": "caltech101",
            "known": prompts.names("caltech101"),
            "ignore": ("BACKGROUND_Google",),
            "suffixes": (".jpg",),
        },
        layout="caltech101/101_ObjectCategories/CLASS/image_NNNN.jpg",
        files=(
            archive(
                "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
                "md5:3138e1922a9193bfa496528edbbc45d0",
                "caltech101",
                inner="caltech-101/101_ObjectCategories.tar.gz",
            ),
        ),
        note="Table 7 counts the 694 validation images among its 6,941 training images; names as in published results",
    ),
    DatasetSpec(
        name="caltech256",
        title="Caltech 256",
        reader="randlora_pl.data.readers.trees:class_tree",
        epochs=8,
        licence="CC BY 4.0",
        source="https://data.caltech.edu/records/nyy15-4j048",
        class_count=257,
        templates=prompts.CALTECH,
        counts=counts(22_037, 2_448, 6_122),
        options={
            "folders": {"train": "caltech256/256_ObjectCategories"},
            "pattern": r"\d{3}\.(.+?)(?:-101)?",
            "suffixes": (".jpg",),
        },
        layout="caltech256/256_ObjectCategories/NNN.CLASS/NNN_NNNN.jpg",
        files=(
            archive(
                "https://data.caltech.edu/records/nyy15-4j048/files/256_ObjectCategories.tar",
                "md5:67b4f42ca05d46448c6bb8ecd2220f6d",
                "caltech256",
            ),
        ),
        note="257 classes: its clutter class counts",
    ),
    DatasetSpec(
        name="pascalvoc",
        title="Pascal VOC 2007, each annotated box cropped",
        reader="randlora_pl.data.readers.lists:boxes",
        epochs=10,
        licence="the photographs are under Flickr's terms of use",
        source="http://host.robots.ox.ac.uk/pascal/VOC/voc2007",
        classnames=prompts.names("pascalvoc"),
        templates=prompts.PHOTO,
        counts=counts(7_844, 7_818, 14_976),
        options={"known": prompts.folders("pascalvoc")},
        layout="VOCdevkit/VOC2007/{Annotations/*.xml,ImageSets/Main/{train,val,test}.txt,JPEGImages/*.jpg}",
        files=(
            archive(f"{_VOC}/VOCtrainval_06-Nov-2007.tar", "md5:c52e279531787c972589f7e41ab4ae64"),
            archive(f"{_VOC}/VOCtest_06-Nov-2007.tar", "md5:b6e924de25625d8de591ea690078ad9f"),
        ),
        note="one class for each box, boxes marked difficult too; its own validation split",
    ),
    DatasetSpec(
        name="ucf101",
        title="UCF101, the middle frame of each video",
        reader="randlora_pl.data.readers.lists:split_file",
        epochs=20,
        licence="not stated by its authors",
        source="https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md (frames), https://www.crcv.ucf.edu/data/UCF101.php",
        class_count=101,
        templates=prompts.ACTION,
        counts=counts(7_639, 1_898, 3_783),
        options={
            "file": "ucf101/split_zhou_UCF101.json",
            "images": "ucf101/UCF-101-midframes",
            "underscores": True,
        },
        layout="ucf101/{split_zhou_UCF101.json,UCF-101-midframes/CLASS/*.jpg}",
        files=(  # no checksums are published
            Archive("UCF-101-midframes.zip", into="ucf101", page=f"{_DRIVE}/10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O/view"),
            Archive("split_zhou_UCF101.json", into="ucf101", page=f"{_DRIVE}/1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y/view"),
        ),
        note="CoOp's split and validation; class names keep their underscores, as in the published zero-shot results",
    ),
)
