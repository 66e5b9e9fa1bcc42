"""Random bases that PEFT draws for adapters that it saved without them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from randlora_pl.adapters.random_bases import WeightShape, sides


def peft_count(small: int, rank: int) -> int:
    """Return PEFT's number of bases for a smaller side: small / rank, rounded up."""
    return -(-small // rank)


def draw_peft_randlora(
    key: int,
    rank: int,
    shapes: Sequence[WeightShape],
    *,
    sparse: bool = False,
    very_sparse: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Draw the bases of a RandLoRA adapter that PEFT saved without them (``save_projection=False``).

    Args:
        key: ``projection_prng_key``.
        rank: ``r``.
        shapes: Shapes of the adapted layers.
        sparse: Ternary entries; +1 and -1 have probability 1/6 each.
        very_sparse: Ternary entries; +1 and -1 have probability 1/(2 sqrt(m)) each. Overrides ``sparse``.
        dtype: Dtype in which PEFT drew dense bases: bfloat16, or float16 on machines without it (macOS before 14, old
            GPUs). Except for tiny layers the two draws are unrelated, and a PEFT file does not store which was used.

    Returns:
        A (r, 1, m) and B (M, n, r), float32, of unit standard deviation.
    """
    small, large = sorted(sides(shapes))
    generator, count = torch.Generator("cpu").manual_seed(key), peft_count(small, rank)
    if sparse or very_sparse:
        half = 1 / (2 * (math.sqrt(small) if very_sparse else 3))
        pair = []
        for shape in ((rank, 1, small), (large, count, rank)):  # by thresholds on uniform numbers
            numbers = torch.rand(shape, generator=generator)
            signs = (numbers > 1 - half).float() - (numbers < half).float()
            pair.append(signs / signs.std())
        return pair[0], pair[1]

    def uniform(*shape: int) -> Tensor:
        return torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=dtype), a=math.sqrt(5), generator=generator)

    a = uniform(rank, 1, small)  # in this order
    b = torch.cat([uniform(large, 1, rank) for _ in range(count)], dim=1)
    return (a / a.std()).float(), (b / b.std()).float()


def draw_peft_vera(key: int, rank: int, shapes: Sequence[WeightShape]) -> tuple[Tensor, Tensor]:
    """Draw A (r, largest input) and B (largest output, r) of a VeRA that PEFT saved without them, float32.

    Kaiming-uniform with gain sqrt(2): uniform on +-sqrt(6 / columns).
    """
    rows, columns = sides(shapes)
    generator = torch.Generator("cpu").manual_seed(key)

    def uniform(*shape: int) -> Tensor:
        # Compute the bound in the order of torch.nn.init: different rounding would give different bits.
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    a = uniform(rank, columns)
    return a, uniform(rows, rank)
