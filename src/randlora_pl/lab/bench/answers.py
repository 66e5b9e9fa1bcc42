"""Speed of a decoder that writes answers in batches, relative to one by one as the released evaluation does."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from randlora_pl.lab.bench.flops import synchronize
from randlora_pl.lab.bench.problems import library_of, token_problem
from randlora_pl.language.models.generate import Decoding, write_tokens
from randlora_pl.language.models.positions import table_of_positions
from randlora_pl.language.models.tokenization import Encoded, collate
from randlora_pl.utils.errors import UserError

SHORTEST, LONGEST = 60, 200
"""Tokens of the prompts: about the length of the commonsense tests' prompts with their template."""


class Answers:
    """A decoder with random weights and prompts of different lengths.

    Merged adapters cost nothing, so that it is the same for each of them. It never writes the token that ends a text,
    so that all answers are as long as they may be.

    Args:
        model: A decoder of transformers that is known by name.
        overrides: Overrides of its configuration.

    Raises:
        UserError: It is not a decoder, transformers is missing, the options make no model, or it has too few positions.
    """

    def __init__(
        self,
        model: str,
        samples: int,
        decoding: Decoding,
        overrides: Mapping[str, Any] | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if library_of(model) != "transformers":
            raise UserError(f"--model {model} writes nothing; give a decoder such as Qwen/Qwen2-0.5B-Instruct")
        self.device, self.decoding = torch.device(device), decoding
        self.model = token_problem(model, 1, 2, overrides).model.to(self.device, dtype).eval()
        generator = torch.Generator().manual_seed(0)
        words = int(self.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        lengths = torch.randint(SHORTEST, LONGEST + 1, (samples,), generator=generator).sort(descending=True).values
        self.prompts = [torch.randint(1, words, (length,), generator=generator).tolist() for length in lengths.tolist()]
        most, longest = table_of_positions(self.model), len(self.prompts[0])
        if most and longest + decoding.max_new_tokens > most:
            raise UserError(
                f"--new-tokens is {decoding.max_new_tokens}: with the longest prompt, {longest} tokens, that is more "
                f"than the {most:,} positions of {model}"
            )
        self.written: dict[int, list[Tensor]] = {}

    def seconds(self, batch_size: int) -> float:
        """Return the seconds for all prompts in batches of a size; the output is kept in `written`.

        One by one they go to transformers as they are, without padding, each read for every beam: that is the
        released evaluation.

        Args:
            batch_size: Prompts of a batch, the longest first.
        """
        groups = [self.prompts[start : start + batch_size] for start in range(0, len(self.prompts), batch_size)]
        multiple = 8 if batch_size > 1 else 1
        batches = [collate([Encoded(ids, ids, len(ids)) for ids in group], 0, "left", multiple) for group in groups]
        found: list[Tensor] = []
        synchronize(self.device)
        start = time.perf_counter()
        for batch in batches:
            here = {name: value.to(self.device) for name, value in batch.items()}
            found += write_tokens(self.model, here, self.decoding, pad=0, share=batch_size > 1).cpu().unbind()
        synchronize(self.device)
        taken = time.perf_counter() - start
        self.written[batch_size] = found
        return taken

    def equal(self, batch_size: int) -> int:
        """Return the number of answers that equal one-by-one decoding, to the last token."""
        return sum(map(torch.equal, self.written[batch_size], self.written[1]))


def speedups(seconds: Mapping[int, Sequence[float]]) -> dict[int, list[float]]:
    """Return the speed relative to one by one, round by round."""
    return {size: [one / own for one, own in zip(seconds[1], taken, strict=True)] for size, taken in seconds.items()}
