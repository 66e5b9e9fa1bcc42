"""Test sets that show ImageNet's classes in other images: for models that were trained on ImageNet."""

from typing import Any

from randlora_pl.data.catalog import templates as prompts
from randlora_pl.data.catalog.spec import DatasetSpec, archive

_TREE = "randlora_pl.data.readers.trees:class_tree"
_BERKELEY = "https://people.eecs.berkeley.edu/~hendrycks"
_V2 = "https://huggingface.co/datasets/vaishaal/ImageNetV2/resolve/main"
_ALL: dict[str, Any] = {"reader": _TREE, "epochs": 10, "classnames": prompts.IMAGENET, "class_count": 1000}
_SOME: dict[str, Any] = {"reader": _TREE, "epochs": 10, "class_count": 200}
_SHARED: dict[str, Any] = {"templates": prompts.IMAGENET_TEMPLATES, "trains_on": "imagenet"}


def _wnids(folder: str) -> dict[str, Any]:
    """Return the reader's options for a folder with some of ImageNet's class folders."""
    return {"folders": {"test": folder}, "known": prompts.folders("imagenet"), "names": prompts.IMAGENET}


ROWS = (
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
        **_SHARED,
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
        **_SHARED,
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
        **_SHARED,
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
        **_SHARED,
    ),
)
