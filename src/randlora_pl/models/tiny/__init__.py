"""Bundled tiny CLIP: an open_clip architecture with four million parameters for 32 x 32 images.

Fine-tuning starts within seconds and without a network. `MODEL_CARD.md`, beside this file, documents its training
data, its accuracy and how to pretrain it again (`scripts/pretrain_tiny_clip.py`).
"""

import functools
import gzip
import io
import itertools
import json
from collections.abc import Callable
from importlib import resources
from typing import Any

from torch import Tensor, nn

from randlora_pl.models.weights import seeded

TINY_TAG = "emoji-fashion"
_FILES = resources.files(__name__)
TINY_CONFIG: dict[str, Any] = json.loads((_FILES / "config.json").read_text(encoding="utf-8"))
"""`model_cfg`, and image preprocessing `preprocess_cfg`: `size` in pixels, `mean`, `std`, `interpolation`."""


def build_tiny(pretrained: str = TINY_TAG, seed: int = 0) -> nn.Module:
    """Build the tiny CLIP in fp32, without changing PyTorch's global generators.

    Args:
        pretrained: `"emoji-fashion"` for the bundled weights or `"random"`.
        seed: Seed of the random weights; the bundled ones do not depend on it.

    Returns:
        An `open_clip.model.CLIP` in training mode, as open_clip builds it. Images are (n, 3, 32, 32), token
        ids (n, 16), embeddings (n, 128).
    """
    from open_clip import CLIP  # takes seconds to import, and the configuration does not need it
    from safetensors.torch import load_file

    with seeded(seed):
        model: nn.Module = CLIP(**TINY_CONFIG["model_cfg"])
    if pretrained == TINY_TAG:
        with resources.as_file(_FILES / "model.safetensors") as path:
            model.load_state_dict(load_file(path))  # strict; fp16 on disk, copied into fp32
    return model


@functools.cache
def tiny_tokenizer() -> Callable[[list[str]], Tensor]:
    """Build CLIP's byte-pair tokenizer with a vocabulary of the tiny model's size, once in a process.

    The ids are, in this order: 256 bytes, 256 bytes at the end of a word, the first merges of open_clip's file, the
    start and the end token. The end token has the largest id, which CLIP's text pooling looks for.

    Returns:
        An `open_clip.tokenizer.SimpleTokenizer`: a list of strings to an int64 tensor (n, 16).
    """
    from open_clip.tokenizer import SimpleTokenizer, default_bpe

    text = TINY_CONFIG["model_cfg"]["text_cfg"]
    merges = text["vocab_size"] - 2 * 256 - 2
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = "".join(itertools.islice(file, merges + 1))  # the first line is the file's header
    packed = io.BytesIO(gzip.compress(lines.rstrip("\n").encode()))
    tokenizer: Callable[[list[str]], Tensor] = SimpleTokenizer(bpe_path=packed, context_length=text["context_length"])
    return tokenizer
