"""Layers that the paper adapts in each family of language models, by the ``model_type`` of transformers' configs.

Targets are aliases of `adapters.targets`, and so fit separate and fused projections alike:

| ``model_type`` | ``qkv``, or ``q`` and ``v`` | ``fc1``, ``fc2`` | ``o`` |
|---|---|---|---|
| qwen2, llama | q_proj, k_proj, v_proj | up_proj, down_proj | o_proj |
| phi3 | qkv_proj | gate_up_proj, down_proj | o_proj |
| roberta | query, key, value | intermediate.dense, output.dense | attention.output.dense |
| gpt2 | rows of attn.c_attn | mlp.c_fc, mlp.c_proj | attn.c_proj |
"""

TARGETS: dict[str, list[str]] = {
    "qwen2": ["qkv", "fc1", "fc2"],  # as in the released scripts: no gate_proj, no o_proj
    "llama": ["qkv", "fc1", "fc2"],
    # All three fused weights, which is what the paper's fractions of parameters agree with; the released scripts name
    # layers that Phi-3 does not have, and would adapt down_proj alone.
    "phi3": ["qkv", "fc1", "fc2"],
    # Every dense layer of the encoder. The head trains as a whole: an update of its first layer, whose name ends in
    # "dense" as well, would be 9,984 parameters more than the paper's 0.72M for RandLoRA-64 of the base model.
    "roberta": ["qkv", "o", "fc1", "fc2"],
    "gpt2": ["q", "v", "fc1", "fc2"],  # E2E: two thirds of c_attn
}


def known_targets(model_type: str) -> list[str] | None:
    """Return the paper's targets for a family of its models, None for others, whose layers may have other names.

    Examples:
        >>> known_targets("gpt2")
        ['q', 'v', 'fc1', 'fc2']
    """
    return list(TARGETS[model_type]) if model_type in TARGETS else None
