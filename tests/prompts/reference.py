"""Slow and obvious: prompts token by token, and learned tokens put into unchanged towers by hooks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Row = list[tuple[int, int | None]]
"""A text: each token's id, and the learned token in its place, if any."""


def row(tokenizer: Any, name: str, words: str, learned: int, position: str = "end") -> Row:
    """The row of a class, whose first words are learned."""
    context: Row = []
    for number, word in enumerate(tokenizer.encode(words)):
        context.append((word, number if number < learned else None))
    before, after = {"end": (4, 0), "middle": (2, 2), "front": (0, 4)}[position]
    assert len(context) == before + after
    found: Row = [(tokenizer.sot_token_id, None)]
    for place in range(before):
        found.append(context[place])
    for word in tokenizer.encode(f"{name}." if position == "end" else name):
        found.append((word, None))
    for place in range(before, 4):
        found.append(context[place])
    for word in tokenizer.encode("." if position != "end" else ""):
        found.append((word, None))
    return [*found, (tokenizer.eot_token_id, None)]


@contextmanager
def hooked(*hooks: tuple[nn.Module, bool, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Change the input (True) or the output of modules."""

    def before(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        return lambda module, inputs: (change(inputs[0]), *inputs[1:])

    def after(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        return lambda module, inputs, output: change(output)

    handles = [
        module.register_forward_pre_hook(before(change)) if first else module.register_forward_hook(after(change))
        for module, first, change in hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def put(x: Tensor, place: int, token: Tensor) -> Tensor:
    """States (1, L, d) with another token in one place."""
    x = x.clone()
    x[0, place] = token
    return x


def text_features(
    model: Any, rows: Sequence[Row], context: Tensor | None = None, deep: Sequence[Tensor] = ()
) -> Tensor:
    """Features (C, e) of rows, one text at a time at full length, by ``encode_text``."""
    tower = model if hasattr(model, "token_embedding") else model.text
    features = []
    for number, items in enumerate(rows):
        ids = torch.zeros(1, model.context_length if tower is model else tower.context_length, dtype=torch.int64)
        for place, (token, _) in enumerate(items):
            ids[0, place] = token
        own = context if context is None or context.dim() == 2 else context[number]

        def embedded(x: Tensor, items: Row = items, own: Tensor | None = own) -> Tensor:
            for place, (_, slot) in enumerate(items):
                if slot is not None:
                    assert own is not None
                    x = put(x, place, own[slot])
            return x

        def states(x: Tensor, tokens: Tensor) -> Tensor:
            for place in range(len(tokens)):
                x = put(x, 1 + place, tokens[place])
            return x

        blocks = tower.transformer.resblocks
        changes = [
            (blocks[block], True, lambda x, tokens=tokens: states(x, tokens))
            for block, tokens in enumerate(deep, start=1)
        ]
        with hooked((tower.token_embedding, False, embedded), *changes):
            features.append(model.encode_text(ids))
    return torch.cat(features)


def image_features(model: Any, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Features (B, e) of images, one at a time, with tokens appended before the first norm and replaced in blocks."""
    visual, count = model.visual, len(prompts[0])
    if hasattr(visual, "trunk"):
        first, blocks, (last, before) = visual.trunk.norm_pre, visual.trunk.blocks, (visual.trunk.norm, True)
    else:
        first, blocks, (last, before) = visual.ln_pre, visual.transformer.resblocks, (visual.transformer, False)

    def states(x: Tensor, tokens: Tensor) -> Tensor:
        for number in range(count):
            x = put(x, x.shape[1] - count + number, tokens[number])
        return x

    changes = [
        (blocks[block], True, lambda x, tokens=tokens: states(x, tokens))
        for block, tokens in enumerate(prompts[1:], start=1)
    ]
    features = []
    for image in images:
        with hooked(
            (first, True, lambda x: torch.cat([x, prompts[0][None]], dim=1)),
            *changes,
            (last, before, lambda x: x[:, : x.shape[1] - count]),
        ):
            features.append(visual(image[None]))
    return torch.cat([each[0] if isinstance(each, tuple) else each for each in features])
