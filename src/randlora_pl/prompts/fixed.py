"""A prompt of words, of which nothing is learned: the loss over all classes with a weight update alone."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from randlora_pl.models.prompted import TextRows, encode_words, is_causal, whole_rows, word_rows
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{}" not in self.template:
            raise UserError(f"template is {self.template!r}: it needs {{}} for the name (--model.prompts.template).")

    @property
    def starts_pretrained(self) -> bool:
        """True: it stays one."""
        return True

    def build(self, model: nn.Module, tokenizer: Tokenizer, classnames: Sequence[str], seed: int) -> Prompts:
        """Return prompts without learned tokens."""
        return _FixedPrompts(self.template, tokenizer)


class _FixedPrompts(Prompts):
    words: Tensor  # of a tower whose words see later ones

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.template, self._tokenizer = template, tokenizer

    def rows(self, classnames: Sequence[str], chunk_tokens: int) -> TextRows:
        room = self._tokenizer([""]).shape[1]
        return word_rows(self._tokenizer, classnames, self.template, room, chunk_tokens)

    def take_classes(
        self, model: nn.Module, classnames: Sequence[str], chunk_tokens: int, device: torch.device
    ) -> None:
        if is_causal(model):
            super().take_classes(model, classnames, chunk_tokens, device)
        else:
            self.register_buffer("words", whole_rows(self._tokenizer, classnames, self.template).to(device), False)
            self._chunk_tokens = chunk_tokens

    def encode_texts(self, model: nn.Module, shift: Tensor | None = None, again: bool = False) -> Tensor:
        if self.classes is None:
            return encode_words(model, self.words, self._chunk_tokens)
        return super().encode_texts(model, shift, again)
