"""S and W0 + B S of a layer as `randlora_linear` needs them: built in one kernel on a GPU, kept over a step.

Symbols as in `randlora_linear`.
"""

import math

import torch
from torch import Tensor

from randlora_pl.adapters.kernels.basis_product import Form, Stored, effective, mixed_stack
from randlora_pl.adapters.kernels.float16 import enlarged
from randlora_pl.adapters.kernels.hadamard import Hadamard
from randlora_pl.adapters.kernels.step_cache import Held
from randlora_pl.adapters.kernels.triton_kernels import choice
from randlora_pl.adapters.kernels.triton_kernels.build import build_weight


def held_stack(
    held: Held, basis: Stored | Hadamard, lambdas: Tensor, gammas: Tensor, a: Tensor, form: Form, dtype: torch.dtype
) -> Tensor:
    """Return the result of `mixed_stack`, kept over the uses of one step."""
    return held.get(
        ("S", dtype, form.scales, basis.rows(dtype)), lambda: mixed_stack(basis, lambdas, gammas, a, form, dtype)
    )


def held_weight(
    held: Held,
    holds: bool,
    weight: Tensor | None,
    basis: Stored | Hadamard,
    lambdas: Tensor,
    gammas: Tensor,
    a: Tensor,
    form: Form,
    dtype: torch.dtype,
) -> Tensor:
    """Return the result of `effective`; over the uses of one step it is kept, or S without ``holds``."""

    def make() -> Tensor:
        if isinstance(basis, Stored) and choice.sums(lambdas, weight, form.dtype, dtype):
            return _built_at_once(weight, basis, lambdas, gammas, a, form, dtype)
        stack = held_stack(Held() if holds else held, basis, lambdas, gammas, a, form, form.dtype)
        return effective(weight, basis, stack, form, dtype)

    return held.get(("built", weight is None, dtype, form), make, weight) if holds else make()


def _built_at_once(
    weight: Tensor | None, b: Stored, lambdas: Tensor, gammas: Tensor, a: Tensor, form: Form, dtype: torch.dtype
) -> Tensor:
    """Return the result of `effective` by a kernel that forms S in registers."""
    signs = b.b.dtype == torch.int8 and b.inner % 16 == 0 and form.dtype != torch.float16
    matrix = b.matrix(torch.int8 if signs else form.dtype)
    factors = lambdas, gammas, a, math.prod((*form.scales, *enlarged(form.dtype)))
    dithers = weight is not None and weight.dtype == torch.bfloat16
    return build_weight(weight, matrix, *factors, form.peft, form.transposed, form.dtype, dtype, dithers)
