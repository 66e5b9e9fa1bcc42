"""Language models of transformers by name or folder, or random; encoders are taken apart into body and head."""

import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from randlora_pl.language.catalog import KNOWN
from randlora_pl.utils.errors import UserError, first_line, near
from randlora_pl.utils.weights_files import asking_hub, no_code_of_others

log = logging.getLogger("randlora_pl")


def need_transformers() -> None:
    """Raise an error with the command that installs the extra if it is missing."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError("Language models need the package transformers: pip install '.[language]' in the checkout")


@contextmanager
def reached(source: str, option: str) -> Iterator[None]:
    """Turn errors of the search for a model, configuration or tokenizer that an option names into a `UserError`.

    Raises:
        UserError: The model is gated, does not exist, or cannot be read.
    """
    need_transformers()
    try:
        with asking_hub(), no_code_of_others():
            yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # besides OSError, ValueError and KeyError, tokenizers raises plain exceptions
        chain: list[BaseException] = [error]
        while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
            chain.append(inner)
        gated = (
            f"is gated: accept its licence at https://huggingface.co/{source}, then log in with `hf auth login` or set "
            "HF_TOKEN."
        )
        if any("gated" in str(link).lower() or type(link).__name__ == "GatedRepoError" for link in chain):
            raise UserError(f"{source} {gated}") from error
        text = str(error).strip() or type(error).__name__
        announces = text.partition("\n")[0].endswith(":")  # the other lines
        reason = (" ".join(text.split()) if announces else text).splitlines()[0][:200].rstrip(".")
        gated = f"\nIt {gated}" if source in KNOWN and KNOWN[source].gated else ""
        raise UserError(
            f"{source} cannot be loaded ({option}): {reason}. Give a folder with its files, a name "
            f"of the Hugging Face Hub with a network, or --model.pretrained random.{gated}"
        ) from error


RANDOM = "random"
_OVERRIDES = "--model.config_overrides"


def model_config(
    name: str, pretrained: str | None, overrides: Mapping[str, Any] | None, option: str = _OVERRIDES
) -> Any:
    """Return the configuration of a model.

    Args:
        name: A name of the Hub, a folder, or for random weights also a model type of transformers such as ``qwen2``.
        pretrained: ``random``, a folder with the weights, or None for the weights of the name.
        overrides: Overrides of the configuration, for random weights only, for example ``{num_hidden_layers: 2}``.
        option: Name of the option with these.

    Raises:
        UserError: The model is unknown or out of reach, or has no such option.
    """
    need_transformers()
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for each file that is read; downloads have their own

    if pretrained != RANDOM:
        if overrides:
            raise UserError(
                "--model.config_overrides needs --model.pretrained random: pretrained weights fix the shapes."
            )
        with reached(pretrained or name, "--model.pretrained" if pretrained else "--model.name"):
            return AutoConfig.from_pretrained(pretrained or name)
    if name in KNOWN:
        config = AutoConfig.for_model(KNOWN[name].kind, **KNOWN[name].shape)
    elif name in CONFIG_MAPPING:
        config = AutoConfig.for_model(name)
    else:
        with reached(name, "--model.name"):
            config = AutoConfig.from_pretrained(name)
    known = config.to_dict()
    for key in overrides or {}:
        if key not in known and key not in config.attribute_map:
            raise UserError(f"{option}: {config.model_type} has no {key!r}.{near(key, known)}")
    values = known | dict(overrides or {})
    if "layer_types" in known and "layer_types" not in (overrides or {}):  # one for each layer
        values.pop("layer_types")
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):  # of a larger vocabulary; a tokenizer gives others
        if isinstance(values.get(token), int) and values[token] >= values.get("vocab_size", math.inf):
            values[token] = None
    values.pop("model_type")
    with possible(overrides, option):
        return AutoConfig.for_model(config.model_type, **values)


@contextmanager
def possible(overrides: Mapping[str, Any] | None, option: str = _OVERRIDES, config: Any = None) -> Iterator[None]:
    """Report options of a configuration that make no model as a one-line error; errors without overrides pass.

    Args:
        overrides: The options.
        option: Name of the option with them.
        config: The configuration with them, if there is one: numbers in it that do not fit are named.
    """
    try:
        yield
    except Exception as error:  # of transformers, huggingface_hub and PyTorch
        if not overrides or isinstance(error, MemoryError):
            raise
        sizes = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        width, heads, shared, size = list[Any](getattr(config, name, None) for name in sizes)
        rotary = getattr(config, "rope_parameters", getattr(config, "rope_theta", None))
        known = isinstance(width, int) and isinstance(heads, int) and heads > 0
        reason, fault = f"{type(error).__name__}: {first_line(error)}", ""
        if known and not size and width % heads:
            fault = f"hidden_size {width} is not a multiple of num_attention_heads {heads}"
        elif known and shared and heads % shared:
            fault = f"num_attention_heads {heads} is not a multiple of num_key_value_heads {shared}"
        elif known and not size and width // heads % 2 and rotary:
            fault = f"hidden_size / num_attention_heads is {width // heads}, but must be even for rotary positions"
        reason = f"{fault} ({reason})" if fault else reason
        raise UserError(f"{option} {dict(overrides)} makes no model: {reason}") from error


@torch.no_grad()
def try_out(model: nn.Module) -> None:
    """Run a new model once: some shapes, such as heads of an odd size, fail no sooner."""
    model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.int64), attention_mask=torch.ones(1, 2, dtype=torch.int64))


def pad_id(tokenizer: Any) -> int:
    """Return the number to pad with: the tokenizer's own, or else the number of the end of text (logged).

    Masks and not numbers mark the padding, so an end of text in a sample still counts.

    Raises:
        UserError: The tokenizer has neither.
    """
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    if tokenizer.eos_token_id is None:
        raise UserError(
            "The tokenizer has neither a padding token nor an end of text: set eos_token in its tokenizer_config.json"
        )
    log.info("The tokenizer has no padding token: padding with its end of text %r, masked", tokenizer.eos_token)
    return int(tokenizer.eos_token_id)


def split(model: Any) -> tuple[nn.Module, nn.ModuleDict]:
    """Return a classifier's encoder, and its head: every other module with weights, and the dropout of BERT."""
    encoder: nn.Module = getattr(model, model.base_model_prefix)
    head = {
        name: child
        for name, child in model.named_children()
        if child is not encoder and (isinstance(child, nn.Dropout) or any(True for _ in child.parameters()))
    }
    return encoder, nn.ModuleDict(head)


def most_tokens(encoder: nn.Module) -> int | None:
    """Return the most tokens that learned positions allow, or None without them; RoBERTa's begin behind the padding."""
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None
