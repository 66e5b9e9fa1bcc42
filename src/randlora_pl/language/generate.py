"""Answers of a decoder: texts written in batches with a cache of keys and values, or the likeliest of some options."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.language.encode import IGNORED, Encoded, collate


@dataclass(frozen=True)
class Decoding:
    """How texts are written; none of it is random.

    Attributes:
        num_beams: Beams of the search, 1 for greedy.
        max_new_tokens: Most tokens of a text.
        length_penalty: Exponent of the length by which a beam's log-likelihood is divided.
        no_repeat_ngram: No sequence of so many tokens is written twice; 0 for no such rule. The prompt does not count:
            a name of several tokens in it could not be written otherwise.
    """

    num_beams: int = 1
    max_new_tokens: int = 32
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0


@torch.no_grad()
def write_texts(model: nn.Module, tokenizer: Any, batch: dict[str, Tensor], decoding: Decoding, pad: int) -> list[str]:
    """What a model writes after prompts.

    Args:
        model: A decoder of transformers.
        tokenizer: Its tokenizer.
        batch: ``input_ids`` and ``attention_mask`` (b, length), padded on the left.
        decoding: How.
        pad: Number to pad with.

    Returns:
        b texts, without the prompts and special tokens.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    how = GenerationConfig(
        do_sample=False,
        use_cache=True,
        num_beams=decoding.num_beams,
        max_new_tokens=decoding.max_new_tokens,
        length_penalty=decoding.length_penalty,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=pad,
    )
    start = batch["input_ids"].shape[1]
    rules = [_NoRepeat(decoding.no_repeat_ngram, start)] if decoding.no_repeat_ngram else []
    generate: Any = model.generate
    ids = generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        generation_config=how,
        logits_processor=LogitsProcessorList(rules),
    )
    written = ids[:, start:]
    texts: list[str] = tokenizer.batch_decode(written, skip_special_tokens=True)
    return texts


class _NoRepeat:
    """transformers' rule against repeated n-grams, on what was written alone.

    Args:
        size: Tokens of an n-gram.
        start: Tokens of the prompt.
    """

    def __init__(self, size: int, start: int) -> None:
        from transformers import NoRepeatNGramLogitsProcessor

        self._rule, self._start = NoRepeatNGramLogitsProcessor(size), start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (b, vocabulary) with -inf for every token that would repeat an n-gram."""
        ruled: Tensor = self._rule(input_ids[:, self._start :], scores)
        return ruled


def learned_columns(labels: Tensor) -> int:
    """Last columns of (b, length) labels that hold all those of the loss: without the prompts, where they are masked.

    The vocabulary is so large that the logits of the other columns are most of the work of a short completion.
    """
    columns = (labels[:, 1:] != IGNORED).any(0).nonzero()
    return labels.shape[1] - 1 - int(columns[0]) if len(columns) else 1


def token_losses(
    model: nn.Module, batch: dict[str, Any], columns: int, smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of every next token.

    Positions are counted from the first token that is no padding, so that a sample's loss does not depend on the
    others of its batch.

    Args:
        model: A decoder of transformers.
        batch: ``input_ids``, ``attention_mask`` and ``labels`` (b, length).
        columns: How many of the last labels to look at (`learned_columns`).
        smoothing: Label smoothing.

    Returns:
        Losses (b, columns), 0 where the label is ignored; whether the likeliest token is the right one; and which
        count, both bool (b, columns).
    """
    mask = batch["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=places,
        use_cache=False,
        logits_to_keep=columns + 1,
    )
    logits, labels = out.logits[:, :-1].float(), batch["labels"][:, -columns:]
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED, label_smoothing=smoothing
    )
    return losses.view_as(labels), logits.detach().argmax(-1) == labels, labels != IGNORED


@torch.no_grad()
def choose_options(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
    pad: int,
    device: torch.device,
) -> list[int]:
    """The likeliest option after each prompt: the one whose tokens have the greatest mean log-likelihood.

    The mean, because options of a question may differ in length.

    Args:
        model: A decoder of transformers.
        prompts: Tokens of each prompt.
        options: Tokens of the options of each.
        pad: Number to pad with.
        device: Where the model is.

    Returns:
        The place of the chosen option for each prompt.
    """
    rows = [
        Encoded([*prompt, *option], [*[IGNORED] * len(prompt), *option], len(prompt) + len(option))
        for prompt, some in zip(prompts, options, strict=True)
        for option in some
    ]
    scores: list[float] = []
    for start in range(0, len(rows), len(prompts)):  # as much memory as for one option of each
        batch = collate(rows[start : start + len(prompts)], pad)
        columns = learned_columns(batch["labels"])
        losses, _, counted = token_losses(model, {name: value.to(device) for name, value in batch.items()}, columns)
        scores += (losses.sum(1) / counted.sum(1).clamp(min=1)).tolist()
    chosen, start = [], 0
    for some in options:
        own = scores[start : start + len(some)]
        chosen.append(own.index(min(own)))
        start += len(some)
    return chosen
