"""A model's own chat template: its text in pieces, the tokens of a conversation, and which of them are learned.

Marks of generated text in a template, which few have, are not needed: the text of the first turns shows where an answer
begins and ends.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

from randlora_pl.language.chat import Conversation, Turns
from randlora_pl.language.tokenization import IGNORED, Encoded
from randlora_pl.utils.errors import UserError, first_line, log


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
            if match := self._control.search(turn.content):
                what = f"the text has {match[0]}, a control token of the model, which would end or begin a turn"
                raise UserError(f"{where}, message {number}: {what}. Remove it.")
        return self._rendered(turns, where)

    def samples(self, conversation: Conversation, cutoff: int) -> Iterator[list[str]]:
        """Yield the pieces of the samples of a conversation, in turn one that is given and one that is learned.

        Of a sample ``cutoff`` tokens are used. It is one sample, unless the template changes earlier answers (Qwen3
        leaves out their thoughts). Then each answer is a sample, after the text that it is generated from.

        Raises:
            UserError: A text contains a control token, or the template refuses the turns, or begins an answer in
                another way for generation.
        """
        turns, where = conversation.turns, conversation.where
        whole = self.question(turns, where)
        answers = [number for number, turn in enumerate(turns, 1) if turn.role == "assistant"]
        together: list[str] = []
        done = 0
        for number in answers:
            given, answer, mark = self.answer(turns[:number], where)
            if not whole.startswith(given + answer + mark):
                mark = ""  # of the last answer alone (Phi-3)
            if not whole.startswith(given + answer + mark):
                break
            together += [given[done:], answer + mark]
            done = len(given + answer + mark)
            # Each answer renders the text before it: a chat of a thousand messages would take minutes.
            if number < answers[-1] and len(self.tokens(whole[:done])) >= cutoff:
                before, _, after = whole[done:].rpartition(self._end)
                yield [*together, (before or after) + self._end]
                return
        else:
            yield [*together[:-1], answer + (mark or self._end)]
            return
        for number in answers:
            given, answer, mark = self.answer(turns[:number], where)
            yield [given, answer + (mark or self._end)]

    def answer(self, turns: Turns, where: str) -> tuple[str, str, str]:
        """Return what the last of these turns is generated from, its text, and its end of text, empty without one.

        Raises:
            UserError: The template refuses the turns, or begins an answer in another way for generation.
        """
        given, answered = self._rendered(turns[:-1], where), self._rendered(turns, where)
        if not answered.startswith(given):
            raise UserError(
                f"{where}: the model's chat template begins an answer in another way for generation, so it "
                "cannot be learned. Use prompts: --data.dataset jsonl"
            )
        # What follows the end of text, such as a line break, is not generated. Without one (Gemma) it is added.
        answer, mark, _ = answered[len(given) :].partition(self._end)
        return given, answer, mark

    def asked(self, chat: Conversation) -> tuple[list[int], str]:
        """Return the tokens before the last answer, never cut, and this answer as a model that learned it writes it.

        Raises:
            UserError: The template does not take the conversation.
        """
        self.question(chat.turns, chat.where)
        given, answer, mark = self.answer(chat.turns, chat.where)
        text: str = self._tokenizer.decode(self.tokens(answer + mark), skip_special_tokens=True)
        return self.tokens(given), text.strip()

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text in the template, without more control tokens."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

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
    its parts are tokenized apart. They are compared up to the cutoff, and several such samples are logged.

    Args:
        tokenizer: A tokenizer of transformers.
        conversations: Turns that end with an answer.
        cutoff: Maximum number of tokens; a longer sample loses its end.
        mask_prompt: Learn the answers and their ends of text only, or else all.

    Raises:
        UserError: The template is missing, or does not take a conversation.
    """
    template, several = ChatTemplate(tokenizer), 0
    for conversation in conversations:
        for number, pieces in enumerate(template.samples(conversation, cutoff)):
            several += number == 1
            ids, ends = template.tokens("".join(pieces)), [0]
            for text in accumulate(pieces):
                own = template.tokens(text)
                if own != ids[: len(own)]:
                    parts = [template.tokens(piece) for piece in pieces]
                    ids, ends = list(chain.from_iterable(parts)), [0, *accumulate(map(len, parts))]
                    break
                ends.append(len(own))
                if len(own) >= cutoff:
                    break
            labels = ids[:cutoff]
            for start, end in list(pairwise(ends))[::2] if mask_prompt else ():
                labels[start:end] = [IGNORED] * (end - start)
            yield Encoded(ids[:cutoff], labels[:cutoff], len(ids))
    if several:
        log.info("The chat template changes earlier answers: each is a sample (%s conversations)", f"{several:,}")
