"""Answers of a decoder: texts written in batches with a cache of keys and values, or the likeliest of some options."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.language.token_losses import check_positions, learned_positions, token_losses
from randlora_pl.language.tokenization import IGNORED, Encoded, collate
from randlora_pl.utils.errors import UserError


@dataclass(frozen=True)
class Decoding:
    """Settings of generation without randomness, see `CausalLMTask`.

    For ``no_repeat_ngram`` the prompt does not count: a name from it may be written.
    """

    num_beams: int = 1
    max_new_tokens: int = 32
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0


def write_texts(model: nn.Module, tokenizer: Any, batch: dict[str, Tensor], decoding: Decoding, pad: int) -> list[str]:
    """Generate texts after b prompts (see `write_tokens`), without the prompts and special tokens."""
    written = write_tokens(model, batch, decoding, pad, tokenizer.eos_token_id, tokenizer.bos_token_id)
    texts: list[str] = tokenizer.batch_decode(written, skip_special_tokens=True)
    return texts


@torch.no_grad()
def write_tokens(
    model: Any,
    batch: dict[str, Tensor],
    decoding: Decoding,
    pad: int,
    eos: int | None = None,
    bos: int | None = None,
) -> Tensor:
    """Generate tokens after prompts, (b, up to max_new_tokens), padded on the right.

    Args:
        model: A decoder of transformers.
        batch: ``input_ids`` and ``attention_mask`` (b, length), padded on the left.
        decoding: Settings of generation.
        pad: Number to pad with.
        eos: The token that ends a text, if there is one.
        bos: The token that begins one, if there is one.

    Raises:
        UserError: The prompts leave too few of the model's positions.
    """
    from transformers import GenerationConfig, LogitsProcessorList, NoRepeatNGramLogitsProcessor

    how = GenerationConfig(
        do_sample=False,
        use_cache=True,
        num_beams=decoding.num_beams,
        max_new_tokens=decoding.max_new_tokens,
        length_penalty=decoding.length_penalty if decoding.num_beams > 1 else None,  # else transformers warns
        eos_token_id=eos,
        bos_token_id=bos,
        pad_token_id=pad,
    )
    start = batch["input_ids"].shape[1]
    rules = LogitsProcessorList()
    if decoding.no_repeat_ngram:
        rule = NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram)
        rules.append(lambda ids, scores: rule(ids[:, start:], scores))
    check_positions(model, batch["attention_mask"], decoding.max_new_tokens)
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    cache = _prompt_cache(model, **prompts, beams=how.num_beams) if how.num_beams > 1 else {}
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:  # `generate` fills what a configuration leaves open from the model's files, such as a repetition penalty
        ids: Tensor = model.generate(**prompts, **cache, generation_config=how, logits_processor=rules)
    finally:
        model.generation_config = own
    return ids[:, start:]


def _prompt_cache(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, beams: int) -> dict[str, Any]:
    """Return keys and values of all tokens of the prompts but the last, for each beam, which reads them once.

    Nothing for prompts of one token, where rotary angles follow the length of the text (NTK's dynamic scaling), and
    where a model keeps anything else, such as the states of linear attention or convolutions (Mamba, LFM2), which
    transformers cannot repeat: it then reads the prompts by itself.
    """
    from transformers import DynamicCache, GenerationMixin
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    ids, mask = input_ids[:, :-1], attention_mask[:, :-1]
    if not ids.shape[1] or any(getattr(module, "rope_type", None) == "dynamic" for module in model.modules()):
        return {}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    takes = signature(GenerationMixin.prepare_inputs_for_generation).parameters
    name = "cache" if "cache" in takes else "past_key_values"  # as it was called before
    cache: Any = getattr(found, name, None)
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    if type(cache) is not DynamicCache or any(type(layer) not in plain for layer in cache.layers):
        return {}
    cache.batch_repeat_interleave(beams)
    return {name: cache}


@torch.no_grad()
def choose_options(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
    pad: int,
    device: torch.device,
) -> list[int]:
    """Return the likeliest option after each prompt, by the mean log-likelihood as options may differ in length.

    Args:
        model: A decoder of transformers.
        prompts: Tokens of each prompt.
        options: Tokens of the options of each.
        pad: Number to pad with.
        device: Device of the model.

    Returns:
        The index of the chosen option for each prompt; of equals the first.

    Raises:
        UserError: A prompt has no tokens or no options, an option has no tokens, or a likelihood is not a number.
    """
    if not all(prompts) or not all(some and all(some) for some in options):
        raise UserError(
            "A prompt or one of its options has no tokens, and so no likelihood: give the model's own tokenizer "
            "(--model.tokenizer), or take --model.evaluation generate."
        )
    rows = [
        Encoded([*prompt, *option], [*[IGNORED] * len(prompt), *option], len(prompt) + len(option))
        for prompt, some in zip(prompts, options, strict=True)
        for option in some
    ]
    scores: list[float] = []
    for start in range(0, len(rows), max(len(prompts), 1)):  # as much memory as for one option of each
        batch = collate(rows[start : start + len(prompts)], pad, "right")
        batch["learned"] = learned_positions(batch["labels"])
        here: dict[str, Any] = {name: value.to(device) for name, value in batch.items()}
        losses, _, counted = token_losses(model, {**here, "padding": "right"})
        scores += (losses.sum(1) / counted.sum(1).clamp(min=1)).tolist()
    chosen, left = [], iter(scores)
    for some in options:
        own = list(islice(left, len(some)))
        if any(map(math.isnan, own)):
            raise UserError(
                "the model's likelihoods are not numbers (NaN): training diverged, or its precision is too low."
            )
        chosen.append(own.index(min(own)))
    return chosen
