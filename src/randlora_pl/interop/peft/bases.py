"""Random bases in PEFT's form: drawn by its recipes, or ours in its shapes and column order.

PEFT keeps one pair of tensors per model: A (r, 1, m) and B (M, n, r), where m and M are the smaller and the larger of
the two maxima (largest output, largest input) of the adapted layers and n = m / r rounded up. A layer slices them and
pairs column p of ``B[:M, :n].flatten(1)`` with the row of A, lambda and gamma that has k = p // n and j = p % n.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from randlora_pl.adapters import RandLoRA
from randlora_pl.adapters.kernels.hadamard import Hadamard
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.adapters.weights import WeightShape, sides
from randlora_pl.utils.errors import UserError


def peft_count(small: int, rank: int) -> int:
    """Return PEFT's number of bases for a smaller side: small / rank, rounded up."""
    return -(-small // rank)


def draw_randlora(
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
        A (r, 1, m) and B (M, n, r), float32.
    """
    small, large = sorted(sides(shapes))
    generator, count = torch.Generator("cpu").manual_seed(key), peft_count(small, rank)
    if sparse or very_sparse:
        half = 1 / (2 * (math.sqrt(small) if very_sparse else 3))
        return _ternary((rank, 1, small), half, generator), _ternary((large, count, rank), half, generator)

    def uniform(*shape: int) -> Tensor:
        return torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=dtype), a=math.sqrt(5), generator=generator)

    a = uniform(rank, 1, small)  # in this order
    b = torch.cat([uniform(large, 1, rank) for _ in range(count)], dim=1)
    return (a / a.std()).float(), (b / b.std()).float()


def _ternary(shape: tuple[int, ...], half: float, generator: torch.Generator) -> Tensor:
    """Draw -1, 0 and 1 by thresholds on uniform numbers, then scale to unit standard deviation."""
    drawn = torch.rand(shape, generator=generator)
    signs = (drawn > 1 - half).float() - (drawn < half).float()
    return signs / signs.std()


def draw_vera(key: int, rank: int, shapes: Sequence[WeightShape]) -> tuple[Tensor, Tensor]:
    """Draw A (r, largest input) and B (largest output, r) of a VeRA adapter saved without them, float32.

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


def arrange(adapter: RandLoRA, shapes: Sequence[WeightShape], bases: Bases) -> tuple[Tensor, Tensor]:
    """Convert our bases to PEFT's shapes and order, so that the same lambda and gamma give the same update.

    If PEFT's order or number of bases differs, the columns of B are permuted, and missing bases are zero. There is one
    permutation for all layers, so they must then have the same numbers of bases.

    Returns:
        A (r, 1, m) and B (M, n, r), float32, in PEFT's shapes.

    Raises:
        UserError: No bases in PEFT's form give this update; the message has the reason.
    """
    if adapter.variant == "a":
        raise UserError("variant a is a product of two sums; PEFT has one sum of products")
    if adapter.lead:
        raise UserError("it has columns of its own (lead), and PEFT has random bases only")
    ranks = sorted({adapter.rank_of(shape) for shape in shapes})
    if len(ranks) > 1:
        raise UserError(f"its layers have ranks {_listed(ranks)}; PEFT's RandLoRA has one rank")
    rank, structured = ranks[0], adapter.basis == "hadamard"
    counts = sorted({adapter.bases_of(shape) for shape in shapes})
    theirs = sorted({peft_count(shape.small, rank) for shape in shapes})
    straight = adapter.pairing == "peft" and all(
        adapter.bases_of(shape) == peft_count(shape.small, rank) for shape in shapes
    )
    if not straight and (len(counts) > 1 or len(theirs) > 1):
        equation = adapter.pairing == "equation"
        why = "pairing: equation permutes" if equation else f"num_bases: {adapter.num_bases} rearranges"
        hint = "train a RandLoRA with --model.adapter.pairing peft" if equation else ""
        raise UserError(f"its layers have {_listed(counts)} bases, and {why} all of them alike", hint)
    if not straight and counts[0] > theirs[0]:
        raise UserError(f"it has {counts[0]} bases of rank {rank}; PEFT makes {theirs[0]}")
    smalls = sorted({shape.small for shape in shapes})
    if structured and len(smalls) > 1:
        raise UserError(f"hadamard bases differ for the smaller sides {_listed(smalls)}; PEFT shares them")
    rows, columns = sides(shapes)
    small, large = sorted((rows, columns))
    a = bases.A[0, :rank].float().cpu()
    if structured:
        depth = max(shape.large for shape in shapes)
        signs = bases.B[..., 0].cpu()
        b = Hadamard(signs, depth, smalls[0], counts[-1] * rank).matrix(torch.float32).view(depth, counts[-1], rank)
    else:
        b = bases.B[:, :, :rank].float().cpu() * bases.scale
    if not straight:
        b = _reordered(b[:, : counts[0]], theirs[0], adapter.pairing == "equation")
    return _sized(a[:, None], (rank, 1, small)), _sized(b, (large, peft_count(small, rank), rank))


def _reordered(b: Tensor, count: int, equation: bool) -> Tensor:
    """Reorder B (D, n, r) to (D, N, r) whose column k N + j belongs to row (k, j), zero for j >= n."""
    own, rank = b.shape[1:]
    k, j = torch.arange(rank)[:, None], torch.arange(own)
    order = j * rank + k if equation else k * own + j  # our column for row (k, j)
    result = b.new_zeros(len(b), rank, count)
    result[:, :, :own] = b.flatten(1)[:, order]
    return result.reshape(len(b), count, rank)


def _sized(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Cut a tensor or pad it with zeros that no layer reads."""
    result = tensor.new_zeros(shape)
    part = tuple(slice(0, min(have, want)) for have, want in zip(tensor.shape, shape, strict=True))
    result[part] = tensor[part]
    return result


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:-1])) + f" and {values[-1]}" if len(values) > 1 else str(values[0])
