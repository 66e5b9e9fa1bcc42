"""Datasets of photographs: fine-grained classes, objects and actions, scenes and signs, shifted tests of ImageNet."""

from typing import Any

from randlora_pl.data import catalog as prompts
from randlora_pl.data.catalog import Archive, DatasetSpec, archive, counts

_ZOO = "randlora_pl.data.readers:torchvision_files"
_TREE = "randlora_pl.data.readers.trees:class_tree"
_VGG = "https://www.robots.ox.ac.uk/~vgg/data"
_VOC = "https://thor.robots.ox.ac.uk/pascal/VOC/voc2007"
_DRIVE = "https://drive.google.com/file/d"
_RUB = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370"
_EUROSAT = "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd"
_RESISC = "https://huggingface.co/datasets/torchgeo/resisc45/resolve/a826b44d938a883185f11ebe3d512d38b464312f"
_SUN = "https://vision.princeton.edu/projects/2010/SUN"
_BERKELEY = "https://people.eecs.berkeley.edu/~hendrycks"
_V2 = "https://huggingface.co/datasets/vaishaal/ImageNetV2/resolve/main"

_TRAIN_TEST = {"train": ("train",), "test": ("test",)}
_SOME: dict[str, Any] = {
    "reader": _TREE, "epochs": 10, "class_count": 200, "templates": prompts.IMAGENET_TEMPLATES, "trains_on": "imagenet",
}  # fmt: skip
_ALL = _SOME | {"classnames": prompts.IMAGENET, "class_count": 1000}


def _wnids(folder: str) -> dict[str, Any]:
    """Return the reader's options for a folder with some of ImageNet's class folders."""
    return {"folders": {"test": folder}, "known": prompts.folders("imagenet"), "names": prompts.IMAGENET}


ROWS = (
    DatasetSpec(
        name="cars",
        title="Stanford Cars",
        reader=_ZOO,
        epochs=35,
        licence="non-commercial research only",
        source="https://ai.stanford.edu/~jkrause/cars/car_dataset.html (offline; copies by hand)",
        class_count=196,
        templates=prompts.CAR,
        counts=counts(7_330, 814, 8_041),
        options={"name": "StanfordCars", "splits": _TRAIN_TEST},
        layout=(
            "stanford_cars/{cars_train/*.jpg,cars_test/*.jpg,cars_test_annos_withlabels.mat,"
            "devkit/{cars_meta.mat,cars_train_annos.mat}}"
        ),
        by_hand=(
            "its own site is gone; a copy in this layout, for a Kaggle login: "
            "https://www.kaggle.com/datasets/rickyyyyyyy/torchvision-stanford-cars",
            "unpack it, so that there are {root}/stanford_cars/cars_train/00001.jpg and 8,143 more, "
            "{root}/stanford_cars/cars_test/00001.jpg and 8,040 more (not cars_train/cars_train),",
            "{root}/stanford_cars/cars_test_annos_withlabels.mat, {root}/stanford_cars/devkit/cars_meta.mat and "
            "{root}/stanford_cars/devkit/cars_train_annos.mat",
            "other copies: https://github.com/pytorch/vision/issues/7545",
        ),
    ),
    DatasetSpec(
        name="food101",
        title="Food-101",
        reader=_ZOO,
        epochs=15,
        licence="research only: the images are Foodspotting's",
        source="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
        classnames=prompts.spaced("food101"),
        templates=prompts.FOOD,
        counts=counts(70_750, 5_000, 25_250),
        options={"name": "Food101", "splits": _TRAIN_TEST, "known": prompts.names("food101")},
        layout="food-101/{meta/{train,test}.json,images/CLASS/*.jpg}",
        files=(archive("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", "md5:85eeb15f3717b99a5da872d97d918f87"),),
    ),
    DatasetSpec(
        name="fgvcaircraft",
        title="FGVC-Aircraft, variants",
        reader=_ZOO,
        epochs=60,
        licence="non-commercial research only",
        source=f"{_VGG}/fgvc-aircraft",
        class_count=100,
        templates=("a photo of a {}, a type of aircraft.", "a photo of the {}, a type of aircraft."),
        counts=counts(3_334, 3_333, 3_333),
        options={"name": "FGVCAircraft", "splits": {"train": ("train",), "val": ("val",), "test": ("test",)}},
        layout="fgvc-aircraft-2013b/data/{variants.txt,images_variant_{train,val,test}.txt,images/*.jpg}",
        files=(
            archive(
                f"{_VGG}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz", "md5:d4acdd33327262359767eeaa97a4f732"
            ),
        ),
        note="its own validation split is not trained on",
    ),
    DatasetSpec(
        name="flowers102",
        title="Oxford Flowers 102",
        reader=_ZOO,
        epochs=40,
        licence="not stated by its authors",
        source=f"{_VGG}/flowers/102",
        classnames=prompts.names("flowers102"),
        templates=prompts.FLOWER,
        counts=counts(1_020, 1_020, 6_149),
        options={"name": "Flowers102", "splits": {"train": ("train",), "val": ("val",), "test": ("test",)}},
        layout="flowers-102/{jpg/image_NNNNN.jpg,imagelabels.mat,setid.mat}",
        files=(
            archive(f"{_VGG}/flowers/102/102flowers.tgz", "md5:52808999861908f626f3c1f4e79d11fa", "flowers-102"),
            archive(f"{_VGG}/flowers/102/imagelabels.mat", "md5:e0620be6f572b9609742df49c70aed4d", "flowers-102"),
            archive(f"{_VGG}/flowers/102/setid.mat", "md5:a5357ecc9cb78c4bef273ce3793fc85c", "flowers-102"),
        ),
        note="10 training images of each class: 16 shots are 10; its own validation split",
    ),
    DatasetSpec(
        name="oxfordpets",
        title="Oxford-IIIT Pet",
        reader=_ZOO,
        epochs=5,
        licence="CC BY-SA 4.0",
        source=f"{_VGG}/pets",
        classnames=prompts.names("oxfordpets"),
        templates=prompts.PET,
        counts=counts(3_312, 368, 3_669),
        options={
            "name": "OxfordIIITPet",
            "splits": {"train": ("trainval",), "test": ("test",)},
            "known": prompts.names("oxfordpets"),
        },
        layout="oxford-iiit-pet/{images/*.jpg,annotations/{trainval,test}.txt}",
        files=(
            archive(f"{_VGG}/pets/data/images.tar.gz", "md5:5c4f3ee8e5d25df40f4fd59a7f44e54c", "oxford-iiit-pet"),
            archive(f"{_VGG}/pets/data/annotations.tar.gz", "md5:95a8c909bbe2e81eed6a22bccdf3f68f", "oxford-iiit-pet"),
        ),
    ),
    DatasetSpec(
        name="cub200",
        title="Caltech-UCSD Birds 200-2011",
        reader="randlora_pl.data.readers.lists:cub200",
        epochs=20,
        licence="non-commercial research and education",
        source="https://data.caltech.edu/records/65de6-vp158",
        class_count=200,
        templates=("a photo of a {}, a type of bird.",),
        counts=counts(5_395, 599, 5_794),
        layout="CUB_200_2011/{images/CLASS/*.jpg,images.txt,classes.txt,image_class_labels.txt,train_test_split.txt}",
        files=(
            archive(
                "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                "md5:97eceeb196236b17998738112f37df78",
                leave=("attributes.txt",),  # outside the dataset's own folder
            ),
        ),
    ),
    DatasetSpec(
        name="imagenet",
        title="ImageNet (ILSVRC 2012)",
        reader=_TREE,
        epochs=10,
        licence="non-commercial research and education, after registration",
        source="https://image-net.org/download-images.php",
        classnames=prompts.IMAGENET,
        class_count=1000,
        templates=prompts.IMAGENET_TEMPLATES,
        counts=counts(1_276_167, 5_000, 50_000),
        options={"folders": {"train": "imagenet/train", "test": "imagenet/val"}, "known": prompts.folders("imagenet")},
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
        reader=_TREE,
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
        options={"file": "ucf101/split_zhou_UCF101.json", "images": "ucf101/UCF-101-midframes", "underscores": True},
        layout="ucf101/{split_zhou_UCF101.json,UCF-101-midframes/CLASS/*.jpg}",
        files=(  # no checksums are published
            Archive("UCF-101-midframes.zip", into="ucf101", page=f"{_DRIVE}/10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O/view"),
            Archive("split_zhou_UCF101.json", into="ucf101", page=f"{_DRIVE}/1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y/view"),
        ),
        note="CoOp's split and validation; class names keep their underscores, as in the published zero-shot results",
    ),
    DatasetSpec(
        name="dtd",
        title="Describable Textures, split 1",
        reader=_ZOO,
        epochs=76,
        licence="research only",
        source=f"{_VGG}/dtd",
        classnames=prompts.names("dtd"),
        templates=prompts.TEXTURE,
        counts=counts(3_384, 376, 1_880),
        options={
            "name": "DTD",
            "splits": {"train": ("train", "val"), "test": ("test",)},
            "known": prompts.names("dtd"),
        },
        layout="dtd/dtd/{images/CLASS/*.jpg,labels/{train1,val1,test1}.txt}",
        files=(archive(f"{_VGG}/dtd/download/dtd-r1.0.1.tar.gz", "md5:fff73e5086ae6bdbea199a49dfb8a4c1", "dtd"),),
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
        templates=tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")),
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
        templates=tuple(f'a {view} photo of a "{{}}" traffic sign.' for view in ("zoomed in", "centered", "close up")),
        counts=counts(23_976, 2_664, 12_630),
        options={"name": "GTSRB", "splits": _TRAIN_TEST, "numbered": ("train",)},
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
        source=f"{_SUN} (SUN397.tar.gz and Partitions.zip)",
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
        reader=_TREE,
        epochs=15,
        licence="Creative Commons, by image (YFCC100M)",
        source="https://openaipublic.azureedge.net/clip/data/country211.tgz",
        classnames=prompts.names("country211"),
        templates=prompts.COUNTRY,
        counts=counts(31_650, 10_550, 21_100),
        options={
            "folders": {"train": "country211/train", "val": "country211/valid", "test": "country211/test"},
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
    DatasetSpec(
        name="imagenet_v2",
        title="ImageNet-V2, matched frequency",
        licence="MIT; the photographs are Flickr's",
        source="https://github.com/modestyachts/ImageNetV2",
        counts={"test": 10_000},
        options={
            "folders": {"test": "imagenetv2/imagenetv2-matched-frequency-format-val"},
            "known": tuple(str(label) for label in range(1000)),
        },
        layout="imagenetv2/imagenetv2-matched-frequency-format-val/{0,1,...,999}/*.jpeg",
        files=(
            archive(
                f"{_V2}/imagenetv2-matched-frequency.tar.gz",
                "sha256:f0c37fdf925916b19ea1323cd9a2208cdb6959ba2c32eef2a7fc393835c9ca7c",
                "imagenetv2",
            ),
        ),
        note="tests only: new photographs, 10 of each class; its folders are label numbers",
        **_ALL,
    ),
    DatasetSpec(
        name="imagenet_sketch",
        title="ImageNet-Sketch",
        licence="MIT; the drawings are their authors'",
        source="https://github.com/HaohanWang/ImageNet-Sketch",
        counts={"test": 50_889},
        options=_wnids("imagenet-sketch/images"),
        layout="imagenet-sketch/images/WNID/*.JPEG",
        by_hand=(
            "get ImageNet-Sketch.zip: https://github.com/HaohanWang/ImageNet-Sketch (Google Drive) or "
            "https://huggingface.co/datasets/songweig/imagenet_sketch/tree/main/data",
            "unpack it, so that {root}/imagenet-sketch/images has 1,000 folders such as n01440764",
        ),
        note="tests only: drawings in black and white, about 50 of each class",
        **_ALL,
    ),
    DatasetSpec(
        name="imagenet_a",
        title="ImageNet-A",
        licence="MIT; the photographs are their authors'",
        source="https://github.com/hendrycks/natural-adv-examples",
        counts={"test": 7_500},
        options=_wnids("imagenet-adversarial/imagenet-a"),
        layout="imagenet-adversarial/imagenet-a/WNID/*.jpg",
        files=(archive(f"{_BERKELEY}/imagenet-a.tar", "md5:c3e55429088dc681f30d81f4726b6595", "imagenet-adversarial"),),
        note="tests only: photographs that a ResNet-50 got wrong, in 200 of ImageNet's classes",
        **_SOME,
    ),
    DatasetSpec(
        name="imagenet_r",
        title="ImageNet-R",
        licence="MIT; the images are their authors'",
        source="https://github.com/hendrycks/imagenet-r",
        counts={"test": 30_000},
        options=_wnids("imagenet-rendition/imagenet-r"),
        layout="imagenet-rendition/imagenet-r/WNID/*.jpg",
        files=(archive(f"{_BERKELEY}/imagenet-r.tar", "md5:a61312130a589d0ca1a8fca1f2bd3337", "imagenet-rendition"),),
        note="tests only: paintings, toys, tattoos and other renditions, in 200 of ImageNet's classes",
        **_SOME,
    ),
)
