"""Language models of transformers and their tokenizers; tokenization with the labels of the loss, in padded batches.

Models are loaded by name or folder, or made at random; encoders are taken apart into body and head.
"""

import importlib.util
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from randlora_pl.language.catalog import KNOWN
from randlora_pl.language.offline import source_of
from randlora_pl.language.prompt_sets import Sample
from randlora_pl.utils.errors import UserError, first_line, install, log, near
from randlora_pl.utils.weights_files import asking_hub, no_code_of_others


def need_transformers() -> None:
    """Raise an error with the command that installs the extra if it is missing."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError(f"Language models need the package transformers: {install('language')}")


@contextmanager
def reached(source: str, option: str) -> Iterator[None]:
    """Turn errors of the search for a model, configuration or tokenizer of an option into a `UserError`.

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
            f"is gated: accept its license at https://huggingface.co/{source}, then log in with `hf auth login` or set "
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
    from transformers import CONFIG_MAPPING, AutoConfig, logging

    logging.disable_progress_bar()  # a bar for each file that is read; downloads have their own

    if pretrained != RANDOM:
        if overrides:
            raise UserError(
                "--model.config_overrides needs --model.pretrained random: pretrained weights fix the shapes."
            )
        with reached(pretrained or name, "--model.pretrained" if pretrained else "--model.name"):
            return AutoConfig.from_pretrained(source_of(pretrained or name))
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
        raise UserError(f"{option} {dict(overrides)} does not give a valid model: {reason}") from error


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
    """Return the most tokens that learned positions allow, or None without them; RoBERTa's begin after the padding."""
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


IGNORED = -100
"""Label of a token without a loss, the default of PyTorch's cross-entropy."""

Side = Literal["left", "right"]


class Encoded(NamedTuple):
    """The tokens of one sample, or of several that are joined to a row.

    Attributes:
        input_ids: Token numbers.
        labels: The same, or `IGNORED` where the loss does not look.
        full_length: Tokens before the cutoff.
        positions: The position of each token in its sample, of a row; else empty.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    full_length: int
    positions: Sequence[int] = ()


def joined(samples: Sequence[Encoded]) -> Encoded:
    """Return samples as one row, in which no token predicts the first one of the next sample."""
    ids, labels, positions = array("i"), array("i"), array("i")
    for sample in samples:
        ids.extend(sample.input_ids)
        labels.extend([IGNORED, *sample.labels[1:]])
        positions.extend(range(len(sample.input_ids)))
    return Encoded(ids, labels, sum(sample.full_length for sample in samples), positions)


@dataclass
class Lengths:
    """Effect of the cutoff on a set of samples.

    Attributes:
        cutoff: Maximum number of tokens of a sample.
        samples: Number of samples.
        cut: Number of longer samples.
        dropped: Number of samples left out, because no learned token was left of them.
        longest: Tokens of the longest.
    """

    cutoff: int
    samples: int = 0
    cut: int = 0
    dropped: int = 0
    longest: int = 0

    def add(self, length: int) -> None:
        """Count one sample by its tokens before the cutoff."""
        self.samples += 1
        self.cut += length > self.cutoff
        self.longest = max(self.longest, length)

    def __str__(self) -> str:
        text = f"{self.cut:,} of {self.samples:,} samples are longer than {self.cutoff} tokens and are truncated"
        text += f" (the longest has {self.longest:,})" if self.cut else ""
        return text + (f"; {self.dropped:,} of them lost all learned tokens and are skipped" if self.dropped else "")


def encode_prompt(tokenizer: Any, prompt: str, separate: bool = False) -> list[int]:
    """Return the tokens of a prompt for generation, never cut; ``separate`` adds an end of text.

    A start of text is set if the tokenizer sets one by itself.
    """
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return [*_start(tokenizer), *ids, *([tokenizer.eos_token_id] if separate else [])]


def _start(tokenizer: Any) -> list[int]:
    start: list[int] = tokenizer("")["input_ids"][:1]
    return start if start == [tokenizer.bos_token_id] else []


def encode(
    tokenizer: Any,
    samples: Iterable[Sample | tuple[str, str]],
    cutoff: int = 256,
    mask_prompt: bool = False,
    separate: bool = False,
) -> Iterator[Encoded]:
    """Yield tokens and labels of samples in their order: prompt, completion, end of text.

    Prompt and completion are tokenized apart, so that the prompts of training and generation have the same tokens, and
    no token is half prompt.

    Args:
        tokenizer: Any Hugging Face tokenizer.
        samples: Prompts and completions.
        cutoff: Maximum number of tokens; a longer sample loses its end and the end of text, as the released scripts do.
        mask_prompt: Learn the completion and the end of text only; by default the whole text.
        separate: Put an end of text between prompt and completion, too (E2E with GPT-2).

    Raises:
        UserError: The tokenizer knows no end of text.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("The tokenizer has no end of text: set eos_token in its tokenizer_config.json")
    start, between = _start(tokenizer), [end] if separate else []
    left = iter(samples)
    while some := list(islice(left, 1000)):  # each call of a tokenizer costs more than a short text
        parts = (tokenizer(list(part), add_special_tokens=False)["input_ids"] for part in zip(*some, strict=True))
        for prompt, completion in zip(*parts, strict=True):
            given = [*start, *prompt, *between]
            ids = [*given, *completion, end]
            labels = [*([IGNORED] * len(given) if mask_prompt else given), *completion, end]
            yield Encoded(ids[:cutoff], labels[:cutoff], len(ids))


def keep(samples: Iterable[Encoded], cutoff: int) -> tuple[list[Encoded], Lengths]:
    """Return samples as arrays, which take a fraction of lists' memory, and the effect of the cutoff on them.

    A sample without a label, as its prompt alone fills the cutoff, is left out: it has no loss.
    """
    kept, lengths = [], Lengths(cutoff)
    for encoded in samples:
        lengths.add(encoded.full_length)
        # The first token is predicted by nothing: its label alone is not a loss either.
        if all(label == IGNORED for label in encoded.labels[1:]):
            lengths.dropped += 1
        else:
            kept.append(Encoded(array("i", encoded.input_ids), array("i", encoded.labels), encoded.full_length))
    if lengths.cut:
        log.warning("%s", lengths)
    return kept, lengths


def collate(encoded: Sequence[Encoded], pad: int, side: Side = "left", multiple: int = 8) -> dict[str, Tensor]:
    """Return a batch for a decoder, padded on the left as generation needs it, or on the right.

    Args:
        encoded: Tokens and labels of each sample.
        pad: Number to pad with (see `pad_id`).
        side: Side of the padding.
        multiple: Divisor of the length; GPUs are faster with multiples of 8, which the paper's scripts have.

    Returns:
        ``input_ids``, ``attention_mask`` (1 at tokens, 0 at padding) and ``labels`` (`IGNORED` at padding), int64 of
        shape (batch, length). Of joined samples also ``position_ids``, which restart (0 at padding).
    """
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels} for ids, labels, *_ in encoded]
    if any(sample.positions for sample in encoded):
        for row, sample in zip(rows, encoded, strict=True):
            row["position_ids"] = sample.positions or range(len(sample.input_ids))
    return _padded(rows, {"input_ids": pad, "labels": IGNORED}, side, multiple)


def _padded(
    rows: Sequence[Mapping[str, Sequence[int]]], fill: Mapping[str, int], side: Side, multiple: int = 8
) -> dict[str, Tensor]:
    length = -(-max(len(row["input_ids"]) for row in rows) // multiple) * multiple
    batch = {name: torch.full((len(rows), length), fill.get(name, 0)) for name in rows[0]}
    for number, row in enumerate(rows):
        for name, values in row.items():
            here = slice(length - len(values), length) if side == "left" else slice(0, len(values))
            batch[name][number, here] = torch.tensor(values, dtype=torch.int64)
    return batch


def encode_sentences(
    tokenizer: Any, sentences: Sequence[Sequence[str]], cutoff: int = 128
) -> tuple[list[Mapping[str, list[int]]], Lengths]:
    """Return the tokenizer's output (``input_ids`` and more) of single texts or pairs, and the cutoff's effect.

    The cutoff includes special tokens; pairs lose tokens of the longer text.
    """
    kept: list[Mapping[str, list[int]]] = []
    lengths = Lengths(cutoff)
    for _, group in groupby(sentences, len):  # all at once: one by one takes five times as long
        texts = list(group)
        encoded = tokenizer(*map(list, zip(*texts, strict=True)))
        for index, own in enumerate(texts):
            whole = {name: values[index] for name, values in encoded.items()}
            size = len(whole["input_ids"])
            lengths.add(size)
            kept.append(whole if size <= cutoff else dict(tokenizer(*own, truncation=True, max_length=cutoff)))
    if lengths.cut:
        log.warning("%s", lengths)
    return kept, lengths


def collate_sentences(tokenizer: Any, encoded: Sequence[Mapping[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """Return a batch for an encoder, padded on the right.

    Args:
        tokenizer: The one that encoded; it defines the padding of inputs other than tokens.
        encoded: See `encode_sentences`.
        pad: Number to pad with (see `pad_id`).

    Returns:
        The tokenizer's inputs, int64 of shape (batch, length).
    """
    fill = {"input_ids": pad, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
    return _padded(encoded, fill, "right")


BYTES = "bytes"
END, PAD = "<|end|>", "<|pad|>"
_CHAT = "{% for turn in messages %}{{ turn.role + ': ' + turn.content + eos_token }}{% endfor %}"
_CHAT += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"


def load_tokenizer(source: str, sentences: bool = False, option: str = "--model.tokenizer") -> Any:
    """Return a tokenizer of transformers.

    Args:
        source: Name of a model on the Hub, a folder, a ``tokenizer.json`` (its end of text must be `END`), or `BYTES`.
        sentences: The tokenizer of bytes sets an end of text before, between and after sentences, too, as an encoder
            needs it; others mark them anyway.
        option: Option that chose it.

    Raises:
        UserError: There is none, or it cannot be had.
    """
    need_transformers()
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    if source != BYTES:
        with reached(source, option):
            if Path(source).is_file():
                return PreTrainedTokenizerFast(tokenizer_file=source, eos_token=END, pad_token=PAD)
            source = source_of(source)
            try:  # AutoTokenizer would ask for a configuration that cannot be had a second time, with all its tries
                config = AutoConfig.from_pretrained(source)
            except ValueError:  # a kind of model that transformers does not know
                config = None
            return AutoTokenizer.from_pretrained(source, config=config)
    # A token per byte, an end of text and padding: 258 in all, for weights without vocabulary.
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    if sentences:
        plain.add_special_tokens([AddedToken(END, special=True)])
        single, pair = f"{END} $A {END}", f"{END} $A {END} $B:1 {END}:1"
        known = [(END, plain.token_to_id(END))]
        plain.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=known)
    template = None if sentences else _CHAT
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=END, pad_token=PAD, chat_template=template)
