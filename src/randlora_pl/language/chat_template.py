"""A model's own chat template: its text in pieces, the tokens of a conversation, and which of them are learned.

Marks of generated text in a template, which few have, are not needed: the text of the first turns shows where an answer
begins and ends.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

from randlora_pl.language.chat import Conversation, Turns
from randlora_pl.language.tokenization import IGNORED, Encoded
from randlora_pl.utils.errors import UserError, first_line, log


class Piece(NamedTuple):
    """A part of a rendered conversation; True if the assistant wrote it."""

    text: str
    learned: bool


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: A tokenizer of transformers.

    Raises:
        UserError: It has no template, or no end of text.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "The tokenizer has no chat template: its model was not trained on conversations.",
                "Choose a model that was, a tokenizer (--model.tokenizer), or prompts: --data.dataset jsonl",
            )
        if tokenizer.eos_token is None:
            raise UserError("The tokenizer has no end of text: set eos_token in its tokenizer_config.json")
        self._tokenizer, self._end = tokenizer, str(tokenizer.eos_token)
        control = {str(token) for token in tokenizer.all_special_tokens}
        control |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))

    def question(self, turns: Turns, where: str) -> str:
        """Return the text that a model reads: checked turns, after the user's with the beginning of an answer.

        Raises:
            UserError: A text contains a control token, or the template refuses the turns.
        """
        for number, turn in enumerate(turns, 1):
            if found := self._control.search(turn.content):
                what = f"the text has {found[0]}, a control token of the model, which would end or begin a turn"
                raise UserError(f"{where}, message {number}: {what}. Remove it.")
        return self._rendered(turns, where)

    def samples(self, conversation: Conversation) -> list[list[Piece]]:
        """Return the pieces of the samples of a conversation.

        It is one sample, unless the template changes earlier answers (Qwen3 leaves out their thoughts). Then each
        answer is a sample, after the text that it is generated from.

        Raises:
            UserError: A text contains a control token, or the template refuses the turns, or begins an answer in
                another way for generation.
        """
        turns, where = conversation.turns, conversation.where
        whole = self.question(turns, where)
        together: list[Piece] = []
        apart: list[list[Piece]] = []
        done, changed = 0, False
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            given, answered = (self._rendered(turns[:last], where) for last in (number, number + 1))
            if not answered.startswith(given):
                raise UserError(
                    f"{where}: the model's chat template begins an answer in another way for generation, so that it "
                    "cannot be learned. Use prompts: --data.dataset jsonl"
                )
            # What follows the end of text, such as a line break, is not generated. Without one (Gemma) it is added.
            answer, mark, _ = answered[len(given) :].partition(self._end)
            apart.append([Piece(given, False), Piece(answer + (mark or self._end), True)])
            if not whole.startswith(given + answer + mark):
                mark = ""  # of the last answer alone (Phi-3)
            changed |= not whole.startswith(given + answer + mark)
            together += [Piece(given[done:], False), Piece(answer + mark, True)]
            done = len(given + answer + mark)
        together[-1] = apart[-1][-1]
        return apart if changed else [together]

    def all_samples(self, conversations: Sequence[Conversation]) -> Iterator[list[Piece]]:
        """Yield the samples of conversations in their order, and log how many are several."""
        several = 0
        for conversation in conversations:
            found = self.samples(conversation)
            several += len(found) > 1
            yield from found
        if several:
            log.info("The chat template changes earlier answers: each is a sample (%s conversations)", f"{several:,}")

    def _rendered(self, turns: Turns, where: str) -> str:
        given, asks = [turn._asdict() for turn in turns], turns[-1].role == "user"
        try:
            text: str = self._tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=asks)
        except Exception as error:  # of jinja2, or of an expression in the template
            reason = first_line(error).rstrip(".")
            raise UserError(
                f"{where}: the model's chat template refuses it: {reason}. Correct the conversation."
            ) from error
        return text


def encode_chats(
    tokenizer: Any, conversations: Sequence[Conversation], cutoff: int = 256, mask_prompt: bool = True
) -> Iterator[Encoded]:
    """Yield tokens and labels of conversations in the tokenizer's chat template, without what follows the last answer.

    The tokens are the template's as a whole wherever a question has the same tokens alone, for generation. Otherwise
    its parts are tokenized apart.

    Args:
        tokenizer: A tokenizer of transformers.
        conversations: Turns that end with an answer.
        cutoff: Most tokens; a longer sample loses its end.
        mask_prompt: Learn the answers and their ends of text only, or else all.

    Raises:
        UserError: The template is missing, or does not take a conversation.
    """
    for pieces in ChatTemplate(tokenizer).all_samples(conversations):
        parts = _tokens(tokenizer, pieces)
        ids = list(chain.from_iterable(parts))
        labels: list[int] = []
        for piece, part in zip(pieces, parts, strict=True):
            labels += part if piece.learned or not mask_prompt else [IGNORED] * len(part)
        yield Encoded(ids[:cutoff], labels[:cutoff], len(ids))


def encode_turns(tokenizer: Any, turns: Turns, where: str) -> list[int]:
    """Return the tokens of a conversation for generation, never cut; ``where`` is its location for errors.

    Raises:
        UserError: The template is missing, or does not take the turns.
    """
    ids: list[int] = tokenizer(ChatTemplate(tokenizer).question(turns, where), add_special_tokens=False)["input_ids"]
    return ids


def encode_question(tokenizer: Any, chat: Conversation) -> tuple[list[int], str]:
    """Return the tokens of a conversation before its last answer, and this answer as a model that learned it writes it.

    Raises:
        UserError: The template is missing, or does not take the conversation.
    """
    answer = ChatTemplate(tokenizer).samples(chat)[-1][-1].text
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return encode_turns(tokenizer, chat.turns[:-1], chat.where), text.strip()


def _tokens(tokenizer: Any, pieces: Sequence[Piece]) -> list[list[int]]:
    """Return the tokens of each piece of a text."""
    starts = list(accumulate(piece.text for piece in pieces))
    cut: list[list[int]] = tokenizer(starts, add_special_tokens=False)["input_ids"]
    if all(cut[-1][: len(ids)] == ids for ids in cut):
        return [cut[-1][start:end] for start, end in pairwise([0, *map(len, cut)])]
    apart: list[list[int]] = tokenizer([piece.text for piece in pieces], add_special_tokens=False)["input_ids"]
    return apart
