"""Choice of the form of a layer's product that takes fewer multiplications, by number of tokens.

Building the update as a matrix, added to the frozen weight, has a fixed cost. Multiplying tokens by its thin factors
has a cost per token. So few tokens use the factors, many use the built weight. The rules count multiplications only.
`built_again` applies a built weight that is not kept for the backward pass.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def builds(tokens: int, rank: int, weight: Tensor, trains: bool) -> bool:
    """Return True if W0 + P Q takes fewer multiplications than two thin products beside the frozen layer.

    In training, P Q and the thin products each have two products of equal cost in the backward pass, and a built weight
    has a gradient of its size.
    """
    out_features, in_features = weight.shape
    built, thin = rank * out_features * in_features, tokens * rank * (out_features + in_features)
    return 3 * built + tokens * out_features * in_features < 3 * thin if trains else built < thin


class Choice(NamedTuple):
    """Cheaper form of a product.

    Attributes:
        build: True to build W0 + B S.
        project: True to compute tokens B first.
    """

    build: bool
    project: bool


def cheapest(tokens: int, large: int, small: int, inner: int, width: int, uses: int = 1) -> Choice:
    """Return the form with the fewest multiplications for a product with W0 + B S.

    Args:
        tokens: T.
        large: D.
        small: d.
        inner: Size of a projected token: n r, or d for structured bases.
        width: Multiplications per value that B is applied to: n r, or the block size of structured bases.
        uses: Products with one built W0 + B S.
    """
    build = large * small * width
    through = tokens * (large * width + inner * small)
    return Choice(build < uses * through, through < build + tokens * large * small)


def cheapest_alone(tokens: int, large: int, small: int, inner: int, width: int, trains: bool) -> Choice:
    """Return the form with the fewest multiplications for ``x B S`` without a W0, summed over all passes in training.

    The outputs and the two gradients each cost D d width + T D d with a built B S. With B and S separately they cost
    T (D width + inner d), but two of the three share a projection: both gradients share the projection of the outputs'
    gradient, or the outputs and S's gradient share the projection of the inputs. ``trains`` is True if gradients are
    needed; the other arguments are as of `cheapest`.
    """
    build = large * small * (width + tokens)
    thick, thin = tokens * large * width, tokens * inner * small
    through = 2 * thick + 3 * thin < 3 * build if trains else thick + thin < build
    return Choice(not through, through)


# Achieved rates of an H100, of which only the ratios matter: multiplications and bytes a second, seconds a kernel.
_MULTIPLICATIONS, _BYTES, _KERNEL = 300e12, 2.75e12, 2.5e-6


def product_time(tokens: int, large: int, small: int) -> float:
    """Return the seconds that a layer's three products of an adapted weight take on a GPU."""
    return 3 * tokens * large * small / _MULTIPLICATIONS


def build_time(large: int, small: int, width: int, structured: bool) -> float:
    """Return the seconds that building W0 + B S takes on a GPU: its multiplications, and its bytes or its kernels.

    An entry of W0 is read and written twice in 16 bits; an entry of S is written and read in float32, with structured
    bases also turned and mixed.
    """
    rows, stack, kernels = (small, 32, 12) if structured else (width, 12, 6)
    moved = (8 * large * small + stack * rows * small) / _BYTES
    return large * small * width / _MULTIPLICATIONS + max(moved, kernels * _KERNEL)


def built_again(x: Tensor, build: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
    """Apply ``F.linear`` with the weight that ``build`` returns, (..., in) to (..., out).

    The backward pass calls ``build`` again, so that no layer keeps a matrix of its weight's size. The product is not
    repeated.
    """

    def product(x: Tensor) -> Tensor:
        return F.linear(x, build(), bias)

    output: Tensor = checkpoint(product, x, use_reentrant=False, preserve_rng_state=False)
    return output
