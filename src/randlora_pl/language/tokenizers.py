"""Tokenizers: those of a model, of a folder or file, and one of plain bytes that needs no file."""

from pathlib import Path
from typing import Any

from randlora_pl.language.hub import need_transformers, reached

BYTES = "bytes"
END, PAD = "<|end|>", "<|pad|>"


def load_tokenizer(source: str) -> Any:
    """A tokenizer of transformers.

    Args:
        source: Name of a model on the Hub, a folder, a ``tokenizer.json`` (its end of text must be `END`), or `BYTES`.

    Raises:
        UserError: There is none, or it cannot be had.
    """
    need_transformers()
    if source == BYTES:
        return byte_tokenizer()
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with reached(source, "--model.tokenizer"):
        if Path(source).is_file():
            return PreTrainedTokenizerFast(tokenizer_file=source, eos_token=END, pad_token=PAD)
        return AutoTokenizer.from_pretrained(source)


def byte_tokenizer() -> Any:
    """A token for each byte, an end of text and a padding token: 258 in all, for weights that know no vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=END, pad_token=PAD)
