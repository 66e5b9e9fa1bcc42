"""Tokenizers of a model, of a folder or file, and of plain bytes, which need no file."""

from pathlib import Path
from typing import Any

from randlora_pl.language.models.hub_errors import need_transformers, reached

BYTES = "bytes"
END, PAD = "<|end|>", "<|pad|>"


def load_tokenizer(source: str, sentences: bool = False, option: str = "--model.tokenizer") -> Any:
    """Return a tokenizer of transformers.

    Args:
        source: Name of a model on the Hub, a folder, a ``tokenizer.json`` (its end of text must be `END`), or `BYTES`.
        sentences: The tokenizer of bytes marks sentences for an encoder, as others do anyway.
        option: Option that chose it.

    Raises:
        UserError: There is none, or it cannot be had.
    """
    need_transformers()
    if source == BYTES:
        return byte_tokenizer(sentences)
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    with reached(source, option):
        if Path(source).is_file():
            return PreTrainedTokenizerFast(tokenizer_file=source, eos_token=END, pad_token=PAD)
        try:  # AutoTokenizer would ask for a configuration that cannot be had a second time, with all its tries
            config = AutoConfig.from_pretrained(source)
        except ValueError:  # a kind of model that transformers does not know
            config = None
        return AutoTokenizer.from_pretrained(source, config=config)


def byte_tokenizer(sentences: bool = False) -> Any:
    """Return a tokenizer with a token per byte, an end of text and padding: 258 in all, for weights without vocabulary.

    With ``sentences`` an end of text is before, between and behind sentences too, as an encoder needs it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    if sentences:
        plain.add_special_tokens([AddedToken(END, special=True)])
        single, pair = f"{END} $A {END}", f"{END} $A {END} $B:1 {END}:1"
        known = [(END, plain.token_to_id(END))]
        plain.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=known)
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=END, pad_token=PAD)
