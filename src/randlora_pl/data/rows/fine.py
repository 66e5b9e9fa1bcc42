"""Fine-grained kinds of one thing: cars, aircraft, flowers, pets, birds, food."""

from randlora_pl.data import prompts
from randlora_pl.data.row import Row, counts

_ZOO = "randlora_pl.data.formats.zoo:torchvision_files"
_TRAIN_TEST = {"train": ("train",), "test": ("test",)}

ROWS = (
    Row(
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
    ),
    Row(
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
        download=True,
    ),
    Row(
        name="fgvcaircraft",
        title="FGVC-Aircraft, variants",
        reader=_ZOO,
        epochs=60,
        licence="non-commercial research only",
        source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
        class_count=100,
        templates=prompts.AIRCRAFT,
        counts=counts(3_334, 3_333, 3_333),
        options={"name": "FGVCAircraft", "splits": {"train": ("train",), "val": ("val",), "test": ("test",)}},
        layout="fgvc-aircraft-2013b/data/{variants.txt,images_variant_{train,val,test}.txt,images/*.jpg}",
        download=True,
        note="its own validation split is not trained on",
    ),
    Row(
        name="flowers102",
        title="Oxford Flowers 102",
        reader=_ZOO,
        epochs=40,
        licence="not stated by its authors",
        source="https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
        classnames=prompts.names("flowers102"),
        templates=prompts.FLOWER,
        counts=counts(1_020, 1_020, 6_149),
        options={"name": "Flowers102", "splits": {"train": ("train",), "val": ("val",), "test": ("test",)}},
        layout="flowers-102/{jpg/image_NNNNN.jpg,imagelabels.mat,setid.mat}",
        download=True,
        note="10 training images of each class: 16 shots are 10; its own validation split",
    ),
    Row(
        name="oxfordpets",
        title="Oxford-IIIT Pet",
        reader=_ZOO,
        epochs=5,
        licence="CC BY-SA 4.0",
        source="https://www.robots.ox.ac.uk/~vgg/data/pets",
        classnames=prompts.names("oxfordpets"),
        templates=prompts.PET,
        counts=counts(3_312, 368, 3_669),
        options={
            "name": "OxfordIIITPet",
            "splits": {"train": ("trainval",), "test": ("test",)},
            "known": prompts.names("oxfordpets"),
        },
        layout="oxford-iiit-pet/{images/*.jpg,annotations/{trainval,test}.txt}",
        download=True,
    ),
    Row(
        name="cub200",
        title="Caltech-UCSD Birds 200-2011",
        reader="randlora_pl.data.formats.lists:cub200",
        epochs=20,
        licence="non-commercial research and education",
        source="https://data.caltech.edu/records/65de6-vp158",
        class_count=200,
        templates=prompts.BIRD,
        counts=counts(5_395, 599, 5_794),
        layout="CUB_200_2011/{images/CLASS/*.jpg,images.txt,classes.txt,image_class_labels.txt,train_test_split.txt}",
    ),
)
