"""Small open_clip architectures, registered as a user's own would be, and a machine without network."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import open_clip.factory
import open_clip.pretrained
import pytest
import torch

torch.set_num_threads(1)

VISION: dict[str, Any] = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
TEXT: dict[str, Any] = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
SMALL: dict[str, Any] = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
TIMM_VISION = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
COCA = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "Small": SMALL,
    "Small-quickgelu": SMALL | {"quick_gelu": True},
    "Small-wide": SMALL | {"vision_cfg": VISION | {"width": 48}},
    "Small-custom": SMALL | {"custom_text": True, "init_logit_bias": -10.0, "nonscalar_logit_scale": True},
    "Small-timm": SMALL | {"vision_cfg": TIMM_VISION},
    "Small-resnet": SMALL | {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}},
    "Small-mean": SMALL | {"vision_cfg": VISION | {"pool_type": "avg", "no_ln_pre": True}},
    "Small-bidirectional": SMALL
    | {"text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}, "custom_text": True},
    "Small-eos": SMALL | {"text_cfg": TEXT | {"pool_type": "eos", "eos_id": 49407}},
    "Small-oblong": SMALL | {"vision_cfg": VISION | {"image_size": [32, 64]}},
    "Small-hf-text": SMALL | {"text_cfg": {"hf_model_name": "no-such-owner/text", "hf_proj_type": "linear"}},
    "Small-hf-tokens": SMALL | {"text_cfg": TEXT | {"hf_tokenizer_name": "no-such-owner/tokens"}},
    "Small-coca": SMALL
    | {
        "vision_cfg": VISION | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": COCA,
        "custom_text": True,
    },
}


@pytest.fixture(scope="session", autouse=True)
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("model_configs")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    yield
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    for name in CONFIGS:
        open_clip.factory._MODEL_CONFIGS.pop(name)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("RANDLORA_PL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tags(monkeypatch: pytest.MonkeyPatch, small_file: Path) -> None:
    """Three tags in open_clip's own table: plain and quick (local files), and one to download."""
    entry = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "resize_mode": "shortest"}
    plain = entry | {"file": str(small_file)}
    quick = plain | {"quick_gelu": True}
    table: dict[str, Any] = {
        "Small": {
            "plain_tag": plain,
            "quick_tag": quick,
            "far_tag": entry | {"hf_hub": "no-such-owner/no-such-model/"},
        },
        "Small-quickgelu": {"quick_tag": copy.deepcopy(quick)},
        "Small-wide": {"one": entry, "other": entry | {"mean": (0.5, 0.5, 0.5)}},
    }
    for name, value in table.items():
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, value)


@pytest.fixture(scope="session")
def small_file(small_models: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of "Small" in torch's own format."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    torch.save(open_clip.create_model("Small").state_dict(), path)
    return path
