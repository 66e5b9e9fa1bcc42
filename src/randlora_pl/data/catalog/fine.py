"""Fine-grained datasets: cars, aircraft, flowers, pets, birds, food."""

from randlora_pl.data.catalog import templates as prompts
from randlora_pl.data.catalog.spec import DatasetSpec, archive, counts

_ZOO = "randlora_pl.data.readers.torchvision:torchvision_files"
_VGG = "https://www.robots.ox.ac.uk/~vgg/data"
_TRAIN_TEST = {"train": ("train",), "test": ("test",)}

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
        templates=prompts.AIRCRAFT,
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
        templates=prompts.BIRD,
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
)
