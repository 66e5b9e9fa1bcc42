"""A prompt of words, of which nothing is learned: the loss over all classes with a weight update alone."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from randlora_pl.models.prompted import TextRows, is_causal, padded, word_ids
from randlora_pl.prompts.base import PromptLearner, Prompts, Tokenizer
from randlora_pl.utils.errors import UserError


class Fixed(PromptLearner):
    """A template for each class; nothing is learned in the prompt.

    With LoRA of rank 2 this is CLIP-LoRA (Zanella and Ben Ayed, arXiv 2405.18541): ``--config clip_lora``.

    Examples:
        >>> task = PromptTask("tiny", prompts=Fixed(template="a photo of a {}."), adapter=LoRA(rank=2))
    """

    template: str = "a photo of a {}."
    """Text with ``{}`` for the name of the class."""

    learns = False
    starts_pretrained = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{}" not in self.template:
            raise UserError(f"template is {self.template!r}: it needs {{}} for the name (--model.prompts.template).")

    def build(self, model: nn.Module, tokenizer: Tokenizer, classnames: Sequence[str], seed: int) -> Prompts:
        """Return prompts without learned tokens."""
        return _FixedPrompts(self.template, tokenizer)


class _FixedPrompts(Prompts):
    words: Tensor  # of a tower whose words see later ones

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.template, self._tokenizer = template, tokenizer

    def rows(self, classnames: Sequence[str], chunk_tokens: int) -> TextRows:
        rows = [word_ids(self._tokenizer, self.template.replace("{}", name)) for name in classnames]
        room = self._tokenizer([""]).shape[1]
        return padded(rows, [[-1] * len(row) for row in rows], classnames, room, chunk_tokens)

    def take_classes(
        self, model: nn.Module, classnames: Sequence[str], chunk_tokens: int, device: torch.device
    ) -> None:
        if is_causal(model):
            super().take_classes(model, classnames, chunk_tokens, device)
            return
        prompts = [self.template.replace("{}", name) for name in classnames]
        tokens = self._tokenizer(prompts)
        room = tokens.shape[1]
        padding = self._tokenizer([""], context_length=2 * room).mode().values
        uncut = self._tokenizer(prompts, context_length=2 * room)
        lengths, whole = ((rows != padding).sum(1) for rows in (tokens, uncut))
        if (lengths != whole).any():
            long = classnames[int((whole - lengths).argmax())]
            raise UserError(
                f"the prompt of class {long!r} is longer than the {room} tokens that the text tower has room for. Take "
                "a shorter one (--model.prompts.template) or a shorter name."
            )
        self.register_buffer("words", tokens.to(device), False)
        self._chunk_tokens = chunk_tokens

    def encode_texts(self, model: nn.Module, shift: Tensor | None = None, again: bool = False) -> Tensor:
        if self.classes is not None:
            return super().encode_texts(model, shift, again)
        encode: Any = model.encode_text
        chunks = torch.split(self.words, max(1, self._chunk_tokens // self.words.shape[1]))
        if len(chunks) > 1 and torch.is_grad_enabled():  # as `encode_rows`
            encode = partial(checkpoint, encode, use_reentrant=False)
        return torch.cat([encode(chunk) for chunk in chunks])
