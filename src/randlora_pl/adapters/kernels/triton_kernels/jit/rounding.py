"""Conversion of float32 sums to the dtype of the result."""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""The interpreter truncates to bfloat16, and computes garbage with it; compiled kernels round to nearest."""


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Return float32 numbers in another dtype, rounded to nearest even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dithered(x, index, DTYPE: tl.constexpr, DITHERS: tl.constexpr):
    """Return float32 numbers in another dtype; with ``DITHERS``, in bfloat16 as `rounding.rounded` of the package does.

    The threshold is a hash of the entry's index in the weight, int32.
    """
    if not DITHERS:
        return rounded(x, DTYPE)
    words = index * -1640531535
    words = (words ^ (words >> 15)) * -2048144777
    threshold = (words ^ (words >> 13)) & 0x7FFF
    bits = x.to(tl.int32, bitcast=True) + 2 * threshold
    total = (bits & -65536).to(tl.float32, bitcast=True)
    return tl.where(x == x, total, x).to(DTYPE)  # a GPU's NaN would overflow to the bits of zero
