"""Class names and prompt templates of the catalog's rows; a template has one ``{}`` for the class name.

The wording of the MNIST and CIFAR10 rows is the one published with CLIP (Radford et al., 2021, prompts of the
27 data sets), because CLIP's zero-shot accuracies are quoted for it.
"""

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_SIGNS = tuple(str(digit) for digit in range(10))

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

PHOTO = ("a photo of a {}.",)
DIGIT = ("An image of the digit {}", "a handwritten digit {}")
NUMBER = ('a photo of the number: "{}".',)
CLOTHING = ("a photo of a {}.", "a photo of the {}.", "a photo of a {}, a type of clothing.")
CAPTION = ("{}",)

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
