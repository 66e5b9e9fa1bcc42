"""Which form of a layer's product takes fewer multiplications, for a number of tokens.

An update can be built as a matrix and multiplied once, together with the frozen weight, which costs the same for any
number of tokens; or the tokens go through its thin factors, which costs nothing but for the tokens. So few tokens go
through the factors, many through a built weight. The rules count multiplications and know no machine.
"""

from typing import NamedTuple

from torch import Tensor


def builds(tokens: int, rank: int, weight: Tensor, trains: bool) -> bool:
    """Whether W0 + P Q costs fewer multiplications than two thin products beside the frozen layer.

    Each of P Q and the thin products has two more like it in the backward pass, and a built weight has a
    gradient of its size.
    """
    out_features, in_features = weight.shape
    built, thin = rank * out_features * in_features, tokens * rank * (out_features + in_features)
    return 3 * built + tokens * out_features * in_features < 3 * thin if trains else built < thin


class Choice(NamedTuple):
    """Which form is cheaper: building W0 + B S, and projecting tokens on B before anything else."""

    build: bool
    project: bool


def cheapest(tokens: int, large: int, small: int, inner: int, width: int) -> Choice:
    """Counts multiplications.

    Args:
        tokens: T.
        large: D.
        small: d.
        inner: Length of a projected token: n r, or d for structured bases.
        width: Multiplications for each number that B acts on: n r, or the block size of structured bases.
    """
    build = large * small * width
    through = tokens * (large * width + inner * small)
    return Choice(build < through, through < build + tokens * large * small)


def cheapest_alone(tokens: int, large: int, small: int, inner: int, width: int, trains: bool) -> Choice:
    """Counts multiplications of ``x B S`` without a W0, all passes together where it trains.

    Each of the outputs and the two gradients costs D d width + T D d with a built B S. Through B and S it costs
    T (D width + inner d), but two of the three share a projection: both gradients that of the outputs' gradient, or
    outputs and S's gradient that of the inputs.

    Args:
        tokens: T.
        large: D.
        small: d.
        inner: Length of a projected token.
        width: Multiplications for each number that B acts on.
        trains: Whether there are gradients.
    """
    build = large * small * (width + tokens)
    thick, thin = tokens * large * width, tokens * inner * small
    through = 2 * thick + 3 * thin < 3 * build if trains else thick + thin < build
    return Choice(not through, through)
