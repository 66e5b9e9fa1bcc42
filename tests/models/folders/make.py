"""Small models in folders, as their libraries would save them."""

import json
from pathlib import Path

import open_clip
import timm
import torch
from safetensors.torch import save_file

from tests.models.conftest import SMALL

FRAME = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}
TIMM = {"architecture": "test_vit", "pretrained_cfg": {"input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "fixed_input_size": True, "num_classes": 5,
        "classifier": "head"}, "model_args": {"img_size": 96}, "num_classes": 5}  # fmt: skip


def clip_folder(folder: Path) -> Path:
    """A folder for open_clip, with a tokenizer of three words in transformers' files."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir()
    config = {**SMALL, "text_cfg": {**SMALL["text_cfg"], "hf_tokenizer_name": "someone/else"}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": FRAME}))
    torch.manual_seed(5)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "cat": 2, "dog": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return folder


def vit_folder(folder: Path) -> Path:
    """A folder for timm: a model of other images than the architecture's, with five classes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TIMM))
    torch.manual_seed(5)
    save_file(timm.create_model("test_vit", img_size=96, num_classes=5).state_dict(), folder / "model.safetensors")
    return folder
