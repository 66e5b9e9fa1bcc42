"""Small models of three libraries, the layers to adapt in each, and how each is called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from tests.adapters.zoo import captions, images, small_clip, small_vit


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=16,
    )  # fmt: skip
    model: nn.Module = BertModel(config).eval()
    return model


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=40, max_position_embeddings=16,
    )  # fmt: skip
    model: nn.Module = LlamaModel(config).eval()
    return model


def _tokens(model: Any) -> Tensor:
    output: Tensor = model(input_ids=torch.arange(1, 9)[None]).last_hidden_state
    return output


def _pixels(model: Any) -> Tensor:
    output: Tensor = model(images())
    return output


def _pairs(model: Any) -> Tensor:
    return torch.cat([model.encode_image(images()), model.encode_text(captions())])


@dataclass(frozen=True)
class Small:
    """A model, PEFT's targets for it and ours, and its outputs, deterministic under one seed."""

    build: Callable[[], nn.Module]
    peft: Any
    ours: list[str]
    call: Callable[[Any], Tensor]

    def outputs(self, model: nn.Module) -> Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            return self.call(model)


MODELS = {
    "timm": Small(small_vit, r"blocks\.\d\.(attn\.(qkv|proj)|mlp\.fc[12])", ["qkv", "o", "mlp"], _pixels),
    "bert": Small(bert, ["query", "value", "intermediate.dense"], ["q", "v", "fc1"], _tokens),
    "llama": Small(llama, ["q_proj", "k_proj", "down_proj"], ["q", "k", "fc2"], _tokens),
    "open_clip": Small(small_clip, ["c_fc", "c_proj"], ["mlp"], _pairs),
}
