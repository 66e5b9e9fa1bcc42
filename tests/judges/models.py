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
    Qwen2Config,
    Qwen2Model,
    RobertaConfig,
    RobertaModel,
)

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


def qwen2() -> nn.Module:
    config = Qwen2Config(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=40, max_position_embeddings=16,
    )  # fmt: skip
    model: nn.Module = Qwen2Model(config).eval()
    return model


def phi3() -> nn.Module:
    """Fused projections, with fewer heads for k and v than for q."""
    config = Phi3Config(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=40, max_position_embeddings=16, original_max_position_embeddings=16, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model: nn.Module = Phi3Model(config).eval()
    return model


def roberta() -> nn.Module:
    config = RobertaConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=20,
    )  # fmt: skip
    model: nn.Module = RobertaModel(config, add_pooling_layer=False).eval()
    return model


def gpt2() -> nn.Module:
    """Layers that store their weights as (in, out)."""
    config = GPT2Config(
        vocab_size=50, n_embd=24, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    model: nn.Module = GPT2Model(config).eval()
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
    "qwen2": Small(qwen2, ["q_proj", "v_proj", "up_proj"], ["q", "v", "fc1"], _tokens),
    "phi3": Small(phi3, ["qkv_proj", "gate_up_proj", "down_proj"], ["qkv", "mlp"], _tokens),
    "roberta": Small(roberta, r".*(query|output\.dense|intermediate\.dense)", ["q", "o", "mlp"], _tokens),
    "gpt2": Small(gpt2, ["c_attn", "c_fc", "mlp.c_proj"], ["qkv", "mlp"], _tokens),
    "open_clip": Small(small_clip, ["c_fc", "c_proj"], ["mlp"], _pairs),
}
