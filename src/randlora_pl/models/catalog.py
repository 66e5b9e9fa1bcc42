"""Known base models, as rows for the `models` command. Imports nothing heavy.

Any other name of open_clip or timm works, too. Parameter counts are for the whole base model (both towers of a CLIP
model, no classifier for timm) and are compared with the built models in the tests.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

_CLIP_LICENSE = "OpenAI, LAION, DataComp: MIT; MetaCLIP: CC-BY-NC-4.0; DFN: Apple's own"
_TIMM_LICENSE = "Apache-2.0"


@dataclass(frozen=True)
class ModelRow:
    """Base model in the catalog.

    Attributes:
        name: Value for ``--model.name``.
        library: ``"open_clip"`` or ``"timm"``.
        tags: Some values for ``--model.pretrained``, the paper's first; ``random`` and files always work.
        config: Bundled configuration that uses it, or an empty string.
        parameters: Parameters of the base model.
        image_size: Height and width in pixels.
        license: License of the weights as stated by their publishers, whose page is authoritative.
    """

    name: str
    library: str
    tags: tuple[str, ...]
    config: str
    parameters: int
    image_size: int
    license: str


MODELS: tuple[ModelRow, ...] = (
    ModelRow("tiny", "open_clip", ("emoji-fashion",), "quickstart", 4_070_913, 32, "see its MODEL_CARD.md"),
    ModelRow("ViT-B-32", "open_clip", ("openai", "laion2b_s34b_b79k", "datacomp_xl_s13b_b90k", "metaclip_fullcc"),
             "clip_vitb32", 151_277_313, 224, _CLIP_LICENSE),
    ModelRow("ViT-B-16", "open_clip", ("openai", "laion2b_s34b_b88k", "datacomp_xl_s13b_b90k", "dfn2b"),
             "", 149_620_737, 224, _CLIP_LICENSE),
    ModelRow("ViT-L-14", "open_clip", ("openai", "laion2b_s32b_b82k", "datacomp_xl_s13b_b90k", "dfn2b"),
             "clip_vitl14", 427_616_513, 224, _CLIP_LICENSE),
    ModelRow("ViT-L-14-336", "open_clip", ("openai",), "", 427_944_193, 336, _CLIP_LICENSE),
    ModelRow("ViT-H-14", "open_clip", ("laion2b_s32b_b79k", "metaclip_fullcc", "dfn5b"),
             "clip_vith14", 986_109_441, 224, _CLIP_LICENSE),
    ModelRow("vit_small_patch14_dinov2", "timm", ("lvd142m",), "", 21_628_800, 224, _TIMM_LICENSE),
    ModelRow("vit_base_patch14_dinov2", "timm", ("lvd142m",), "dinov2_vitb14", 85_724_928, 224, _TIMM_LICENSE),
    ModelRow("vit_large_patch14_dinov2", "timm", ("lvd142m",), "", 303_227_904, 224, _TIMM_LICENSE),
    ModelRow("vit_tiny_patch16_224", "timm", ("augreg_in21k",), "", 5_524_416, 224, _TIMM_LICENSE),
    ModelRow("vit_small_patch16_224", "timm", ("augreg_in21k", "dino"), "", 21_665_664, 224, _TIMM_LICENSE),
    ModelRow("vit_base_patch16_224", "timm", ("augreg_in21k", "dino"), "", 85_798_656, 224, _TIMM_LICENSE),
)  # fmt: skip
"""The tested base models, in the order of the listing."""

MATRIX = Path(__file__).with_name("matrix.csv")
"""Table of every architecture of open_clip and timm, written by ``scripts/model_matrix.py``."""


def matrix() -> list[dict[str, str]]:
    """Return the rows of the table of all architectures.

    Its columns: ``library``, ``name``; ``linear`` and ``convolutions``, adapted by default of all; the adapted share of
    the weights of the blocks in percent for ``RandLoRA``, ``LoRA`` and ``DoRA``; the largest ``frozen`` weights with
    their share; what needs the ``hub`` and so was not checked; why the model is ``refused``; the number of pretrained
    ``tags``, of them ``equal`` to the library's preprocessing, and how the others are ``different``.
    """
    with MATRIX.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))
