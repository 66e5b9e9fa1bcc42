"""Small models of three libraries, the layers to adapt in each, and how each is called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    Phi3Config,
    Phi3Model,
    PretrainedConfig,
    Qwen2Config,
    Qwen2Model,
    RobertaConfig,
    RobertaModel,
)

from tests.adapters.zoo import captions, images, small_clip, small_vit

SIZES = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 40}
GROUPED = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
"""Fewer heads for k and v than for q."""


def _model(kind: type, config: PretrainedConfig, **options: Any) -> nn.Module:
    model: nn.Module = kind(config, **options).eval()
    return model


def bert() -> nn.Module:
    return _model(BertModel, BertConfig(**SIZES, num_attention_heads=2, max_position_embeddings=16))


def llama() -> nn.Module:
    return _model(LlamaModel, LlamaConfig(**GROUPED))


def qwen2() -> nn.Module:
    return _model(Qwen2Model, Qwen2Config(**GROUPED))


def phi3() -> nn.Module:
    """Fused projections."""
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return _model(Phi3Model, Phi3Config(**GROUPED, **tokens, original_max_position_embeddings=16))


def roberta() -> nn.Module:
    config = RobertaConfig(**SIZES, num_attention_heads=2, max_position_embeddings=20)
    return _model(RobertaModel, config, add_pooling_layer=False)


def gpt2() -> nn.Module:
    """Layers that store their weights as (in, out)."""
    sizes = {"vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return _model(GPT2Model, GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.2))


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
    "qwen2": Small(qwen2, ["q_proj", "v_proj", "up_proj"], ["q", "v", "fc1"], _tokens),
    "phi3": Small(phi3, ["qkv_proj", "gate_up_proj", "down_proj"], ["qkv", "mlp"], _tokens),
    "roberta": Small(roberta, r".*(query|output\.dense|intermediate\.dense)", ["q", "o", "mlp"], _tokens),
    "gpt2": Small(gpt2, ["c_attn", "c_fc", "mlp.c_proj"], ["qkv", "mlp"], _tokens),
    "open_clip": Small(small_clip, ["c_fc", "c_proj"], ["mlp"], _pairs),
}
