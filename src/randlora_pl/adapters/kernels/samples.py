"""Updates of several adapters in one batch: each sample's own, added to outputs (b, T, out) for inputs (b, T, in).

In sums of bases, the samples share A and B, and lambda and gamma differ. Row (j, k) of S has the product

    (S x)_jk = lambda_jk sum_i gamma_ji (A_ki x_i)

So the inputs are multiplied by the r rows of A, by the gammas in a batched product, and by lambda. No matrix of the
weight's size is built for a sample, and B is one product for all samples.
"""

from collections.abc import Hashable, Sequence
from typing import Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from randlora_pl.adapters.kernels.basis_product import Factors, Stored
from randlora_pl.adapters.kernels.common import compute_dtype, in_parts, without_autocast
from randlora_pl.adapters.kernels.hadamard import Hadamard


class Joint:
    """Update that several samples apply together, each with its own values; an update of two factors needs no such."""

    def joint_key(self) -> Hashable:
        """Return what updates of a layer have in common if `add_joint` takes them together."""
        raise NotImplementedError

    def add_joint(self, updates: Sequence[Self], x: Tensor, onto: Tensor) -> None:
        """Add the update of each sample to outputs (b, T, out) in place, for inputs (b, T, in)."""
        raise NotImplementedError


def add_factors(factors: Sequence[tuple[Tensor, Tensor]], x: Tensor, onto: Tensor) -> None:
    """Add ``x (P Q)^T`` of each sample to outputs in place, for P (out, k) and Q (k, in) of each sample."""
    x = x.to(compute_dtype(x))
    p = pad_sequence([p.T for p, _ in factors], batch_first=True)  # ranks may differ
    q = pad_sequence([q for _, q in factors], batch_first=True)
    onto.baddbmm_(torch.bmm(x, q.mT.to(x.dtype)), p.to(x.dtype))


def add_sums(factors: Factors, basis: Stored | Hadamard, peft: bool, transposed: bool, x: Tensor, onto: Tensor) -> None:
    """Add ``x (B S)^T`` of each sample to outputs in place.

    Args:
        factors: Lambda (b, n, r) with its scales and gamma (b, n, d) of each sample, and A (r, d).
        basis: B of the layer.
        peft: True for PEFT's order of S.
        transposed: True if the weight is wider than tall.
        x: Inputs, (b, T, in).
        onto: Outputs, (b, T, out).
    """
    x = x.to(compute_dtype(x))
    lambdas, gammas, a = (factor.to(x.dtype) for factor in factors)
    with without_autocast(x):
        for part in in_parts(x, x.shape[1]):  # r times the inputs at once would be returned to the system at every use
            _add_some((lambdas[part].mT[:, None], gammas[part], a), basis, peft, transposed, x[part], onto[part])


def _add_some(
    factors: Factors, basis: Stored | Hadamard, peft: bool, transposed: bool, x: Tensor, onto: Tensor
) -> None:
    """Add the update of samples that are computed at once; lambda is (b, 1, r, n), the rest as in `add_sums`."""
    (batch, tokens, _), (lambdas, gammas, a) = x.shape, factors
    (rank, _), count = a.shape, gammas.shape[1]
    if transposed:
        columns = basis.project(x.flatten(0, 1)).flatten(1).T
        if isinstance(basis, Hadamard):
            columns = columns.reshape(basis.blocks, basis.block, -1)
        parts = basis.unmixed(columns, x.dtype).view(*((rank, count) if peft else (count, rank)), batch, tokens)
        parts = parts.permute(2, 3, 0, 1) if peft else parts.permute(2, 3, 1, 0)
        sums = torch.bmm((parts * lambdas).flatten(1, 2), gammas).view(batch, tokens, rank, -1)
        for row, values in enumerate(a):  # one product for all rows takes three times as long
            onto.addcmul_(sums[:, :, row], values)
        return
    parts = torch.bmm((x[:, :, None] * a).flatten(1, 2), gammas.mT).view(batch, tokens, rank, count) * lambdas
    parts = parts.permute(2, 3, 0, 1) if peft else parts.permute(3, 2, 0, 1)
    mixed = basis.mixed(parts.reshape(rank * count, -1), x.dtype)
    outputs = onto.view(batch * tokens, -1)
    result = basis.expand(mixed.reshape(-1, batch * tokens).T, outputs)
    if result is not outputs:  # a kernel has made new ones
        onto.copy_(result.view(onto.shape))
