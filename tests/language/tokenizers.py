"""Small tokenizers, trained in the tests."""

from typing import Any

from randlora_pl.language.tokenization import Encoded, encode

TEXTS = [
    "The instruction below describes a task. Write a response that completes it.",
    "### Instruction: ### Response: the correct answer is true false solution1 answer2 ending3 option1",
    "name : The Vaults | Type : pub | price : more than £ 30",
]


def byte_tokenizer(pad: bool = True, end: bool = True, start: bool = False) -> Any:
    """A byte-level BPE as GPT-2's and Qwen2's: every text comes back from its tokens.

    Args:
        pad: Whether it has a padding token.
        end: Whether it has an end of text.
        start: Whether it sets a start of text by itself, as Llama-3's does.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<end>", "<pad>", "<start>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<start> $A", pair="<start> $A $B", special_tokens=[("<start>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>" if end else None,
        pad_token="<pad>" if pad else None,
        bos_token="<start>" if start else None,
    )


def sentence_tokenizer() -> Any:
    """Words between a start and an end, and segment numbers, as BERT's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    tokenizer.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def encode_one(tokenizer: Any, sample: tuple[str, str], *how: Any, **more: Any) -> Encoded:
    """Tokens and labels of one sample."""
    return next(encode(tokenizer, [sample], *how, **more))
