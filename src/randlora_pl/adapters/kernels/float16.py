"""Power of two between B and S in float16 products, so that a small S does not become zero.

The smallest positive number of float16 is 6e-8. In the first steps from a zero lambda or gamma, all of S is smaller.
So S is multiplied by 2^12 before it is rounded, and the copies of B by 2^-12. This is exact for entries of +-1, and
changes others by at most 1.2e-4, less than the rounding of an entry near 1. Products are the same. Gradients of lambda
and gamma get the factor back in float32. They need the loss scale of ``16-mixed``, as all gradients in float16 do.
Output gradients of 1e-5 after that scale lose precision: an error of 2 % in gamma's gradient, 0.2 % at 1e-4.

The range: S, and tokens or scaled gradients times S, up to 16 instead of 65,504. An update of the size of its weight
has an S of 0.01. Beyond the range gradients are infinite, and the loss scale falls as at every overflow.
"""

import torch

POWER = 2.0**12


def enlarged(dtype: torch.dtype) -> tuple[float, ...]:
    """Return the further factor of S in products of this dtype, as a part of `Form.scales`."""
    return (POWER,) if dtype == torch.float16 else ()


def shrunk(b: torch.Tensor) -> torch.Tensor:
    """Return a new copy of B, or of a factor of it, with the inverse factor of `enlarged`, in place."""
    return b.mul_(1 / POWER) if b.dtype == torch.float16 else b
