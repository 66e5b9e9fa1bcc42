"""Kernel of `quick_gelu`, imported at its first use."""

import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def backward_kernel(out, gradient, x, count, SCALE: tl.constexpr, BLOCK: tl.constexpr = BLOCK):
    """Write the gradient of QuickGELU's input, `BLOCK` entries a program."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    z = SCALE * tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(z)
    slope = share * (1 + z * (1 - share))
    result = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) * slope
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)
