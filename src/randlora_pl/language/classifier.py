"""Encoders of transformers with a classification head, taken apart into what is frozen and what trains as a whole."""

import sys
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters.random_bases import Distribution, draw
from randlora_pl.language.loading import RANDOM, check_vocabulary, model_config, pretrained_model, random_model
from randlora_pl.language.tokenization import pad_id
from randlora_pl.models.weights import seeded
from randlora_pl.utils.device import on_cuda
from randlora_pl.utils.errors import UserError


def load_classifier(
    name: str,
    pretrained: str | None,
    tokenizer: Any,
    classnames: Sequence[str],
    *,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """Return a sequence classifier in eval mode on the CPU, float32 (see `model_config` for its arguments).

    Tensors of the head that the files lack start at N(0, initializer_range^2), biases at 0, from the seed alone; a head
    of other classes is left out. A model with random weights has the special tokens of the tokenizer. Without names of
    classes it gives one score.

    Raises:
        UserError: The model cannot be had, has no classification head, lacks weights of its encoder, or its vocabulary
            is smaller than the tokenizer's.
    """
    config = model_config(name, pretrained, overrides)
    from transformers import AutoModelForSequenceClassification, logging

    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise UserError(
            f"transformers has no {config.model_type} for classification. Choose an encoder (--model.name)."
        )
    check_vocabulary(tokenizer, config, name)
    config.num_labels = max(1, len(classnames))
    if classnames:
        config.id2label = dict(enumerate(classnames))
        config.label2id = {label: number for number, label in config.id2label.items()}
    config.problem_type = "single_label_classification" if classnames else "regression"
    if pretrained == RANDOM:
        pad = pad_id(tokenizer)
        model = random_model(AutoModelForSequenceClassification, config, tokenizer, pad, seed, overrides)
        absent = set(model.state_dict())
        missing: list[str] = []
    else:
        if config.pad_token_id is None:
            config.pad_token_id = pad_id(tokenizer)
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # the head is new on purpose
        options = {"config": config, "dtype": torch.float32, "ignore_mismatched_sizes": True}
        try:
            with seeded(seed):
                model, info = pretrained_model(AutoModelForSequenceClassification, name, pretrained, **options)
        finally:
            logging.set_verbosity(level)
        other = {each if isinstance(each, str) else each[0] for each in info["mismatched_keys"]}
        absent = set(info["missing_keys"]) | other
        missing = sorted(key for key in absent if key.startswith(f"{model.base_model_prefix}."))
    if missing:
        raise UserError(
            f"{name} lacks {len(missing)} tensors of its encoder, such as {missing[0]}: these weights are not a "
            f"complete {config.model_type} encoder. Choose others (--model.name, --model.pretrained)."
        )
    _start(split(model)[1], absent, seed, float(getattr(config, "initializer_range", 0.02)))
    return model.eval()


def split(model: Any) -> tuple[nn.Module, nn.ModuleDict]:
    """Return a classifier's encoder, and its head: every other module with weights, and the dropout of BERT."""
    encoder: nn.Module = getattr(model, model.base_model_prefix)
    head = {
        name: child
        for name, child in model.named_children()
        if child is not encoder and (isinstance(child, nn.Dropout) or any(True for _ in child.parameters()))
    }
    return encoder, nn.ModuleDict(head)


def _start(head: nn.ModuleDict, absent: set[str], seed: int, deviation: float) -> None:
    with torch.no_grad():
        for name, value in head.named_parameters():
            if name in absent and value.dim() > 1:
                size, normal = (len(value), value[0].numel()), Distribution("normal")
                rows = draw(seed, f"head/{name}", 1, *size, normal, torch.device("cpu"))
                value.copy_(deviation * rows[0].reshape(value.shape))
            elif name in absent:
                value.fill_(1.0 if name.endswith("weight") else 0.0)  # of a norm


def most_tokens(encoder: nn.Module) -> int | None:
    """Return the most tokens that learned positions allow, or None without them; RoBERTa's begin behind the padding."""
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def takes_segments(config: Any) -> bool:
    """Return True if an encoder marks the two sentences of a pair by ``token_type_ids``."""
    return int(getattr(config, "type_vocab_size", 0) or 0) > 1


def unread_mask(encoder: nn.Module, mask: Tensor) -> Tensor:
    """Return a padding mask (b, n) for an encoder; on a GPU as the encoder itself would make it, (b, 1, n, n).

    transformers reads a mask (b, n) on the host, to leave out one without padding, and so waits for the GPU.
    """
    make = vars(sys.modules[type(encoder).__module__]).get("create_bidirectional_mask")
    if not on_cuda(mask) or make is None or "allow_is_bidirectional_skip" not in signature(make).parameters:
        return mask
    config: Any = encoder.config
    if config._attn_implementation not in ("sdpa", "eager"):
        return mask
    embedded = next(encoder.parameters()).new_empty(1).expand(*mask.shape, 1)  # for its shape, dtype and device
    made: Tensor = make(config, embedded, mask, allow_is_bidirectional_skip=False)
    return made


def inputs_of(batch: Mapping[str, Any], segments: bool) -> dict[str, Tensor]:
    """Return a classifier's inputs from a batch."""
    names = ("input_ids", "attention_mask", *(("token_type_ids",) if segments else ()))
    return {name: batch[name] for name in names if name in batch}
