"""Rows of token ids for the texts of all classes, with slots for learned tokens."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from randlora_pl.utils.errors import UserError

Position = Literal["end", "middle", "front"]
"""Place of a class name: after the learned tokens, between their halves, or before them."""

_ROOM = 1024
"""Tokens that a tokenizer may write, so that it cuts no text; a row is checked against the tower's own length."""


class TextRows(nn.Module):
    """Token rows of C texts, sorted by length and divided into chunks of about equal work.

    A causal tower gives a text's feature at its end token, which sees nothing behind it. So each chunk is cut to its
    longest text, and results equal the ones of full rows.

    Args:
        ids: (C, L) int64, filled up with 0; words or any id under a slot.
        slots: (C, L) int64: the learned token that takes a place, or -1 for a word.
        ends: (C,) int64: position of the end token.
        chunk_tokens: Tokens of a chunk, at most; a text of more is a chunk of its own.

    Attributes:
        order: (C,) row of each text in the given order, by place in the sorted one.
        inverse: (C,) place in the sorted order of each given text.
        chunks: Start, stop and length of each chunk in the sorted order.
    """

    ids: Tensor
    slots: Tensor
    ends: Tensor
    order: Tensor
    inverse: Tensor

    def __init__(self, ids: Tensor, slots: Tensor, ends: Tensor, chunk_tokens: int = 4096) -> None:
        super().__init__()
        order = ends.argsort(stable=True)
        sorted_rows = {"ids": ids[order], "slots": slots[order], "ends": ends[order]}
        for name, value in {**sorted_rows, "order": order, "inverse": order.argsort()}.items():
            self.register_buffer(name, value, persistent=False)
        self.chunks = _chunks((ends[order] + 1).tolist(), chunk_tokens)

    def __len__(self) -> int:
        return len(self.ids)


def _chunks(lengths: list[int], most: int) -> list[tuple[int, int, int]]:
    """Return start, stop and length of chunks of sorted lengths, each with at most as many tokens if possible."""
    found, start = [], 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or (stop + 1 - start) * lengths[stop] > most:
            found.append((start, stop, lengths[stop - 1]))
            start = stop
    return found


def word_ids(tokenizer: Callable[..., Tensor], text: str) -> list[int]:
    """Return the token ids of a text, without start and end token."""
    return _whole(tokenizer, text)[1:-1]


def _whole(tokenizer: Callable[..., Tensor], text: str) -> list[int]:
    row = tokenizer([text], context_length=_ROOM)[0]
    return row[: int(row.argmax()) + 1].tolist()  # CLIP's end token has the largest id


def word_rows(
    tokenizer: Callable[..., Tensor], names: Sequence[str], template: str, room: int, chunk_tokens: int = 4096
) -> TextRows:
    """Return rows without learned tokens: a template with ``{}`` for each name.

    Args:
        tokenizer: The tokenizer of the model.
        names: C names of classes.
        template: Text with ``{}`` for the name.
        room: Positions of the text tower.
        chunk_tokens: See `TextRows`.

    Raises:
        UserError: A text is longer than the tower's rows.
    """
    rows = [_whole(tokenizer, template.replace("{}", name)) for name in names]
    return _padded(rows, [[-1] * len(row) for row in rows], names, room, chunk_tokens)


def whole_rows(tokenizer: Callable[..., Tensor], names: Sequence[str], template: str) -> Tensor:
    """Return rows (C, L) of any tokenizer, not cut, for towers whose words see later ones.

    Raises:
        UserError: A text is longer than the rows.
    """
    prompts = [template.replace("{}", name) for name in names]
    tokens = tokenizer(prompts)
    room = tokens.shape[1]
    padding = tokenizer([""], context_length=2 * room).mode().values
    lengths, whole = ((rows != padding).sum(1) for rows in (tokens, tokenizer(prompts, context_length=2 * room)))
    if (lengths != whole).any():
        long = names[int((whole - lengths).argmax())]
        raise UserError(
            f"the prompt of class {long!r} is longer than the {room} tokens that the text tower has room for. Take "
            "a shorter one (--model.prompts.template) or a shorter name."
        )
    return tokens


def learned_rows(
    tokenizer: Callable[..., Tensor],
    names: Sequence[str],
    context: Sequence[int],
    learned: int,
    room: int,
    position: Position = "end",
    chunk_tokens: int = 4096,
) -> TextRows:
    """Return rows of start token, context, name, full stop and end token, whose first context tokens are learned.

    Args:
        tokenizer: The tokenizer of the model.
        names: C names of classes.
        context: Token ids of the context, those under a slot too.
        learned: Number of the first tokens of the context that are learned.
        room: Positions of the text tower.
        position: Place of the name.
        chunk_tokens: See `TextRows`.

    Raises:
        UserError: A text is longer than the tower's rows.
    """
    numbers = [number if number < learned else -1 for number in range(len(context))]
    before = {"end": len(context), "middle": len(context) // 2, "front": 0}[position]
    pairs = list(zip(context, numbers, strict=True))
    rows, slots = [], []
    for name in names:
        if position == "end":
            start, *own, end = _whole(tokenizer, f"{name}.")
            stop: list[int] = []
        else:
            (start, *own, end), stop = _whole(tokenizer, name), word_ids(tokenizer, ".")
        row = [(start, -1), *pairs[:before], *((word, -1) for word in own), *pairs[before:]]
        row += [(word, -1) for word in [*stop, end]]
        rows.append([token for token, _ in row])
        slots.append([number for _, number in row])
    return _padded(rows, slots, names, room, chunk_tokens)


def _padded(
    rows: list[list[int]], slots: list[list[int]], names: Sequence[str], room: int, chunk_tokens: int
) -> TextRows:
    """Return rows of one length; refuse a row that the tower has no room for."""
    long = max(range(len(rows)), key=lambda number: len(rows[number]))
    if len(rows[long]) > room:
        raise UserError(
            f"the prompt of class {names[long]!r} has {len(rows[long])} tokens, the text tower has room for {room}. "
            "Take a shorter context (--model.prompts.length) or a shorter name."
        )
    width = len(rows[long])

    def filled(lists: list[list[int]], value: int) -> Tensor:
        return torch.tensor([each + [value] * (width - len(each)) for each in lists])

    ends = torch.tensor([len(row) - 1 for row in rows])
    return TextRows(filled(rows, 0), filled(slots, -1), ends, chunk_tokens)
