"""Class names and prompt templates of the datasets; a template has one ``{}`` for the class name.

The wording was published with CLIP (Radford et al., 2021, prompts of the 27 datasets) and includes its odd spellings,
because CLIP's zero-shot accuracies refer to it; the names of Caltech, CIFAR-100, UCF101, Cars and CUB and the prompt
of SVHN belong to the published accuracies that `zeroshot` shows. Long lists are text files in ``names`` with one class
per line by label: the folder name, and after a tab the class name if it differs; ImageNet's file has folders only.
"""

import importlib.util
from pathlib import Path

_NAMES = Path(__file__).parents[1] / "names"


def _columns(data_set: str) -> list[list[str]]:
    return [line.split("\t") for line in (_NAMES / f"{data_set}.txt").read_text(encoding="utf-8").splitlines()]


def names(data_set: str) -> tuple[str, ...]:
    """Return the class names of a dataset by label, from its text file."""
    return tuple(columns[-1] for columns in _columns(data_set))


def spaced(data_set: str) -> tuple[str, ...]:
    """Return the class names with spaces for underscores."""
    return tuple(name.replace("_", " ") for name in names(data_set))


def folders(data_set: str) -> tuple[str, ...]:
    """Return the folder names of the classes, by label."""
    return tuple(columns[0] for columns in _columns(data_set))


DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_SIGNS = tuple(str(digit) for digit in range(10))

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")

PHOTO = ("a photo of a {}.",)
PHOTOS = ("a photo of a {}.", "a photo of the {}.")
DIGIT = ("An image of the digit {}", "a handwritten digit {}")
NUMBER = ('a photo of the number: "{}".',)
EMOJI = ("an emoji of {}",)
CLOTHING = (*PHOTOS, "a photo of a {}, a type of clothing.")
CAPTION = ("{}",)

FOOD = ("a photo of {}, a type of food.",)
FLOWER = ("a photo of a {}, a type of flower.",)
PET = ("a photo of a {}, a type of pet.",)
BIRD = ("a photo of a {}, a type of bird.",)
AIRCRAFT = ("a photo of a {}, a type of aircraft.", "a photo of the {}, a type of aircraft.")
CAR = (
    *PHOTOS,
    "a photo of my {}.",
    "i love my {}!",
    *(f"a photo of my {state} {{}}." for state in ("dirty", "clean", "new", "old")),
)
TEXTURE = tuple(
    f"a photo of {article} {{}} {kind}."
    for article in ("a", "the")
    for kind in ("texture", "pattern", "thing", "object")
)
SATELLITE = tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the "))
OVERHEAD = tuple(
    f"{camera} {kind} of {article}{{}}."
    for article in ("", "a ", "the ")
    for kind in ("imagery", "photo", "view")
    for camera in ("satellite", "aerial")
)
SIGN = tuple(f'a {view} photo of a "{{}}" traffic sign.' for view in ("zoomed in", "centered", "close up"))
COUNTRY = (
    "a photo i took in {}.",
    "a photo i took while visiting {}.",
    "a photo from my home country of {}.",
    "a photo from my visit to {}.",
    "a photo showing the country of {}.",
)
ACTION = tuple(
    f"a {kind} of {who} {doing}{{}}."
    for who in ("a person", "the person")
    for doing in ("", "using ", "doing ", "during ", "performing ", "practicing ")
    for kind in ("photo", "video", "example", "demonstration")
)

_BEFORE = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
_SIZES = ("small ", "big ")
CIFAR = tuple(
    template
    for article in ("a", "the")
    for template in (
        *(f"a {adjective}photo of {article} {{}}." for adjective in _BEFORE),
        *(f"a photo of {article} {size}{{}}." for size in _SIZES),
    )
)

_DEPICTIONS = ("photo", "painting", "sculpture", "sketch", "tattoo", "rendition", "drawing", "doodle")
_LIKENESSES = ("plastic", "toy", "embroidered", "cartoon", "plushie", "origami")
CALTECH = tuple(
    template
    for article in ("a", "the")
    for template in (
        *(f"a {depiction} of {article} {{}}." for depiction in _DEPICTIONS),
        *(f"{article} {likeness} {{}}." for likeness in _LIKENESSES),
        f"{article} {{}} in a video game.",
        f"art of {article} {{}}.",
        f"graffiti of {article} {{}}.",
    )
)


def _imagenet() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return open_clip's ImageNet names and templates; load the file alone, because the package imports PyTorch."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:  # the doctor command still lists the datasets
        return (), PHOTO
    path = Path(package.submodule_search_locations[0]) / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("open_clip_zero_shot_metadata", path)
    if spec is None or spec.loader is None or not path.is_file():
        return (), PHOTO
    metadata = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(metadata)
    templates = tuple(template("{}") for template in metadata.OPENAI_IMAGENET_TEMPLATES)
    return tuple(metadata.IMAGENET_CLASSNAMES), templates


IMAGENET, IMAGENET_TEMPLATES = _imagenet()
