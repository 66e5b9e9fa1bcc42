"""Limits of a decoder's table of positions."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from randlora_pl.utils.errors import UserError

_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "positions_embed")
"""Names of modules of learned positions, and of CodeGen's table of rotary ones; others have no last position."""


def table_of_positions(model: Any) -> int | None:
    """Return the number of positions in a model's table, learned (GPT-2) or not (CodeGen); None without a table."""
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    tables = [*modules, *(name for name, _ in model.named_buffers())]
    if not any(name.rpartition(".")[2] in _POSITIONS for name in tables):
        return None
    most: int | None = getattr(model.config, "max_position_embeddings", None)
    return most


def check_positions(model: Any, mask: Tensor, more: int = 0) -> None:
    """Refuse texts that are longer than a decoder's table of positions, which would end in an index error.

    Args:
        model: A decoder of transformers.
        mask: 1 at tokens, 0 at padding, (b, length).
        more: Tokens that will follow.
    """
    most = getattr(model.config, "max_position_embeddings", None)
    if most is None or mask.shape[1] + more <= most or (longest := int(mask.sum(1).max()) + more) <= most:
        return
    if table_of_positions(model):
        new = f" ({more} of them new: --model.max_new_tokens)" if more else ""
        raise UserError(
            f"A text has {longest:,} tokens{new}, and {model.config.model_type} has {most:,} positions: lower "
            "--data.cutoff, or shorten the prompts of the tests."
        )


def check_prompts(model: Any, prompts: Sequence[Sequence[int]], more: int) -> None:
    """Refuse prompts without tokens, and prompts too long for a decoder to write ``more`` tokens after them."""
    if not all(prompts):
        raise UserError(f"{sum(not each for each in prompts):,} of {len(prompts):,} prompts have no token.")
    most = table_of_positions(model)
    long = [] if most is None else [len(each) for each in prompts if len(each) + more > most]
    if long:
        raise UserError(
            f"{len(long):,} of {len(prompts):,} prompts are too long: the longest has {max(long):,} tokens, "
            f"{more} more are to follow, and {model.config.model_type} has {most:,} positions. Shorten them, or lower "
            "--max-new-tokens."
        )
