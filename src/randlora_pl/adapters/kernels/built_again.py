"""A linear layer whose weight is built for each pass, for updates that take less time to build than a product takes."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def built_again(x: Tensor, build: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
    """Apply ``F.linear`` with the weight that ``build`` returns, (..., in) to (..., out).

    The backward pass calls ``build`` again, so that no layer keeps a matrix of its weight's size. The product is not
    repeated.
    """

    def product(x: Tensor) -> Tensor:
        return F.linear(x, build(), bias)

    output: Tensor = checkpoint(product, x, use_reentrant=False, preserve_rng_state=False)
    return output
