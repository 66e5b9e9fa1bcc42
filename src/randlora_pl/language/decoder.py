"""Losses and generation of a decoder.

The loss of every learned token takes no padding mask, no logits of other tokens, and few logits at a time. A decoder's
table of positions limits its texts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from randlora_pl.language.tokenization import IGNORED, Encoded, collate, joined
from randlora_pl.utils.errors import UserError


def table_of_positions(model: Any) -> int | None:
    """Return the number of positions in a model's table, learned (GPT-2) or not (CodeGen); None without a table."""
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    tables = [*modules, *(name for name, _ in model.named_buffers())]
    # Modules of learned positions, and CodeGen's table of rotary ones; others have no last position.
    known = ("wpe", "embed_positions", "position_embeddings", "positions_embed")
    if not any(name.rpartition(".")[2] in known for name in tables):
        return None
    most: int | None = getattr(model.config, "max_position_embeddings", None)
    return most


def check_positions(model: Any, mask: Tensor, more: int = 0) -> None:
    """Refuse texts that are longer than a decoder's table of positions, which would end in an index error.

    Args:
        model: A decoder of transformers.
        mask: 1 at tokens, 0 at padding, (b, length).
        more: Tokens that will follow.
    """
    most = getattr(model.config, "max_position_embeddings", None)
    if most is None or mask.shape[1] + more <= most or (longest := int(mask.sum(1).max()) + more) <= most:
        return
    if table_of_positions(model):
        mend = "Shorten the prompts, or lower --model.max_new_tokens (in predict: --max-new-tokens)."
        raise UserError(
            f"A text has {longest:,} tokens{f', {more} of them new' * bool(more)}, and {model.config.model_type} has "
            f"{most:,} positions. {mend if more else 'Lower --data.cutoff.'}"
        )


_LOGITS = 2**26
"""More logits are computed in parts: 128,256 for each of 4,096 tokens and what their loss keeps are 9 GB."""
_TOKENS = 1024
"""Tokens of a part: fewer leave a GPU idle in the product that gives their gradient."""
_ROWS = 32
"""Tokens whose logits are float32 at a time."""

Head = Callable[[Tensor], Tensor]


def learned_positions(labels: Tensor) -> Tensor:
    """Return the indices into b x length flat tokens whose next token is learned, for (b, length) labels."""
    return nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1)).flatten().nonzero()[:, 0]


def token_losses(model: nn.Module, batch: dict[str, Any], smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of every next token.

    A sample's loss does not depend on the others of its batch. With the padding on the right, no token of a decoder
    sees it, so that no mask is needed and attention runs at its fastest, without a wait of the host for the device.

    Args:
        model: A decoder of transformers.
        batch: ``input_ids``, ``attention_mask`` and ``labels`` (b, length). ``padding`` is ``right`` where each row
            begins with its text; without it the mask is used. ``learned`` has the `learned_positions` of the labels;
            without it the host waits for them. ``position_ids`` restart at each sample of a row that has several.
        smoothing: Label smoothing.

    Returns:
        Losses (b, length - 1), 0 where the label is ignored; whether the likeliest token is the right one; and which
        count, both bool (b, length - 1).

    Raises:
        UserError: A sample is longer than the model's positions.
    """
    labels: Tensor = batch["labels"]
    where: Tensor = batch["learned"] if "learned" in batch else learned_positions(labels)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    config: Any = model.config
    if "position_ids" not in batch:  # which a sample within the positions has
        check_positions(model, mask)
    inputs = {"input_ids": ids, "use_cache": False}
    masked = batch.get("padding") != "right" or config.model_type == "xlnet"  # which sees the tokens behind each one
    if masked:
        inputs["attention_mask"] = mask
    # The padding must neither exceed a table of positions, nor lengthen a text that its angles depend on.
    most, angles = getattr(config, "max_position_embeddings", None), str(getattr(config, "rope_parameters", ""))
    if "position_ids" in batch:
        inputs["position_ids"] = batch["position_ids"]
    elif masked or (most is not None and ids.shape[1] > most) or "dynamic" in angles or "longrope" in angles:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    hidden, head = _learned_states(model, inputs, where, "position_ids" in batch)
    losses, right = _losses(model, hidden, labels.flatten().roll(-1)[where], head, smoothing)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(labels.numel()).index_copy(0, where, values).view_as(labels)[:, :-1]

    return spread(losses), spread(right), labels[:, 1:] != IGNORED


def check_apart(model: Any) -> None:
    """Refuse a decoder in which a sample of a row sees the one before it, or has other positions than alone.

    transformers cuts attention where positions restart, in the models that use its masks; no trait of a model says so.
    The losses of a sample behind another one are compared to its losses behind a third, and to its losses alone.

    Args:
        model: A decoder of transformers in eval mode.

    Raises:
        UserError: The losses differ.
    """
    weights, vocabulary = next(model.parameters()), model.config.get_text_config().vocab_size
    tokens = [[step * number % vocabulary for number in range(1, 5)] for step in (1, 2, 3)]
    sample, before, other = (Encoded(ids, ids, len(ids)) for ids in tokens)

    def losses(row: Encoded) -> Tensor:
        batch = collate([row], 0, "right")
        on_device = {name: value.to(weights.device) for name, value in batch.items()}
        return token_losses(model, {**on_device, "padding": "right"})[0][0]

    with torch.no_grad():
        behind, elsewhere = (losses(joined([first, sample]))[4:7] for first in (before, other))
        alone = losses(sample)[:3]
    rounding = 1e-4 if weights.dtype == torch.float32 else 0.05  # of another kernel
    same = rounding if getattr(model, "is_loaded_in_8bit", False) else 1e-5  # 8 bits round by all tokens of a batch
    if not (torch.allclose(behind, elsewhere, same, same) and torch.allclose(behind, alone, rounding, rounding)):
        kind = model.config.model_type
        raise UserError(f"--data.packing: {kind} does not keep the samples of a row apart. Remove the option.")


def _learned_states(model: Any, inputs: dict[str, Any], where: Tensor, packed: bool) -> tuple[Tensor, Head]:
    """Return the last hidden states (m, width) of m tokens, and the function that makes logits (m, vocabulary) of them.

    The function is the model's own forward with a base model that only hands over given states, so that whatever scales
    or bounds the logits stays. The one call of the whole model, which FSDP2 demands, makes the logits of one token.
    A model whose forward does not call its base model gives all logits.
    """
    from transformers import PreTrainedModel, masking_utils

    base: Any = getattr(model, model.base_model_prefix, model)
    kept: list[Any] = []

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        kept.append(output)
        return type(output)(**{**output, "last_hidden_state": output.last_hidden_state[:1, -1:]})

    def head(states: Tensor) -> Tensor:
        own = vars(base).get("forward")
        base.forward = lambda *_, **__: type(kept[0])(**{**kept[0], "last_hidden_state": states[None]})
        try:
            logits: Tensor = type(model).forward(model, **inputs).logits.flatten(0, 1)  # a view, unlike [0] in reverse
        finally:
            if own is None:
                del base.forward
            else:
                base.forward = own
        return logits

    hook = None if base is model else base.register_forward_hook(keep)
    # transformers would ask if a row has several texts or padding, and the host would wait for the answers.
    names = {masking_utils: "find_packed_sequence_indices", PreTrainedModel: "warn_if_padding_and_no_attention_mask"}
    if packed:
        del names[masking_utils]
    questions = {place: getattr(place, name) for place, name in names.items()}
    try:
        for place, name in names.items():
            setattr(place, name, lambda *_: None)
        output = model(**inputs)
    finally:
        for place, name in names.items():
            setattr(place, name, questions[place])
        if hook is not None:
            hook.remove()
    if kept:
        return kept[0].last_hidden_state.flatten(0, 1)[where], head
    return output.logits.flatten(0, 1)[where], lambda logits: logits


def _losses(model: Any, states: Tensor, labels: Tensor, head: Head, smoothing: float) -> tuple[Tensor, Tensor]:

    def at_once(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states).float()
        losses = nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        return losses, logits.detach().argmax(-1) == labels

    if len(labels) * model.config.get_text_config().vocab_size <= _LOGITS:
        return at_once(states, labels)
    base = getattr(model, model.base_model_prefix, model)
    trains = any(p.requires_grad for child in model.children() if child is not base for p in child.parameters())
    if not trains and states.dtype != torch.float16:
        losses, right = _InParts.apply(states, labels, head, smoothing)  # type: ignore[no-untyped-call, unused-ignore]
        return losses, right
    parts = [checkpoint(at_once, *part, use_reentrant=False) for part in _parts(_TOKENS, states, labels)]
    return torch.cat([losses for losses, _ in parts]), torch.cat([right for _, right in parts])


def _parts(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)


class _InParts(torch.autograd.Function):
    """Losses of many tokens beneath a frozen head, and the gradient of each at once, before its logits are dropped.

    A token's loss depends on its own hidden state alone, so that its gradient is known up to the factor that the
    backward pass brings: nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, labels: Tensor, head: Head, smoothing: float) -> tuple[Tensor, Tensor]:
        """Return the losses (m,), float32, and whether the likeliest token is the label (m,)."""
        need = ctx.needs_input_grad[0]
        parts = [_part(some, own, head, smoothing, need) for some, own in _parts(_TOKENS, states, labels)]
        losses, right, gradients = (torch.cat([one[place] for one in parts]) for place in range(3))
        ctx.save_for_backward(gradients)
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradient of each token by its factor."""
        (gradients,) = ctx.saved_tensors
        return (gradients * outer[0][:, None]).to(gradients.dtype), None, None, None


def _part(states: Tensor, labels: Tensor, head: Head, smoothing: float, need: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses, whether the likeliest token is the label, and on request the gradients by the hidden states."""
    with torch.set_grad_enabled(need):
        inner = states.detach().requires_grad_(need)
        logits = head(inner)
    values, parts = logits.detach(), []
    step = values.new_full((_ROWS, 1), smoothing - 1, dtype=torch.float32)
    for some, wanted in _parts(_ROWS, values, labels):
        rows = some.to(torch.float32, copy=True)
        most, likeliest = rows.max(1, keepdim=True)
        at_label = rows.sub_(most).gather(1, wanted[:, None])  # distances from the largest
        mean = rows.mean(1, keepdim=True) if smoothing else at_label
        total = rows.exp_().sum(1, keepdim=True)
        parts.append((total, at_label, mean, likeliest))
        if need:  # (p - (1 - s) at the label - s / V), over the logits, which nothing else needs
            rows.div_(total)
            if smoothing:
                rows.sub_(smoothing / rows.shape[1])
            some.copy_(rows.scatter_add_(1, wanted[:, None], step))
    (gradients,) = torch.autograd.grad(logits, inner, values) if need else (states[:0],)
    total, at_label, mean, likeliest = (torch.cat([one[place] for one in parts]) for place in range(4))
    losses = total.log() - (1 - smoothing) * at_label - smoothing * mean
    return losses[:, 0], likeliest[:, 0] == labels, gradients


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
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    takes = signature(GenerationMixin.prepare_inputs_for_generation).parameters
    name = "cache" if "cache" in takes else "past_key_values"  # as it was called before
    cache: Any = getattr(output, name, None)
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
            "(--model.tokenizer), or use --model.evaluation generate."
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
