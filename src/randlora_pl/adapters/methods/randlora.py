"""RandLoRA: full-rank updates from scaled random bases (equation 4 of the paper).

    delta W = alpha/r * sum_j B_j diag(lambda_j) A diag(gamma_j)

B_j (D, r) and one shared A (r, d) are random and frozen, lambda_j (r) and gamma_j (d) are trained. D is the larger
side of the weight and d the smaller one; for a weight that is wider than tall the update is transposed.

Rank of the update by distribution:

- Dense bases: min(d, n r).
- Ternary A (the paper's form, ``a_basis="same"``): at most the number of nonzero columns of A, because a zero column of
  A is a zero column of the update (for r = 6 and d = 768, 700 are expected at s = 6, 278 at the square root of 768).
  Section C.6 of the paper considers only coinciding rows. So A consists of signs by default, which have no zeros: the
  rank is full (a square layer at s = 200 may still lose the one or two rows for which every B_j is zero).
- A of signs with two or three rows: may be slightly below d, because few distinct columns exist; in practice not from
  rank 4 on.
- Hadamard: full by construction, also for each d x d block of rows (see `hadamard`).
"""

from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from randlora_pl.adapters.base import Adapter, DeltaWeight, Rank
from randlora_pl.adapters.kernels.hadamard import STRUCTURE, copies
from randlora_pl.adapters.methods.lead import LedRandLoRADelta
from randlora_pl.adapters.methods.randlora_update import RandLoRADelta, SummedRandLoRADelta
from randlora_pl.adapters.random_bases import Bases, Distribution, draw
from randlora_pl.adapters.weights import WeightShape
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Count, NotNegative, between

Pairing = Literal["equation", "peft"]
BasisName = Literal["uniform", "normal", "binary", "ternary", "hadamard"]
ABasis = Literal["auto", "same", "uniform", "signs"]


class RandLoRA(Adapter):
    """RandLoRA: random low-rank bases, summed to a full-rank update with trained diagonal scalings.

    Examples:
        >>> inject(model, RandLoRA(rank=6)).trainable
        13860
        >>> plain = merge_and_unload(model)
        >>> report = inject(model, RandLoRA(match="lora:4", basis="hadamard"))  # about as many parameters as LoRA-4
    """

    rank: Rank = 6
    """Rank r of each basis; a higher rank means fewer trainable parameters. A number, or numbers by pattern of layer
    names (``{".*mlp.*": 4}``; other layers use the default)."""
    alpha: float | dict[str, float] = 10.0
    """The update is scaled by alpha / r (Table 8: 10 / r). A number, or numbers by pattern, as ``rank``."""
    num_bases: Count | Literal["ceil", "floor+1"] | dict[str, Count] = "ceil"
    """Number n of bases: ``ceil`` for d/r rounded up, ``floor+1`` as the official code, a number, or numbers by
    pattern."""
    basis: BasisName = "uniform"
    """Distribution of the bases, with unit standard deviation (Table 3); ``hadamard`` bases consist of signs and small
    orthogonal transforms, are never stored, and are the fastest."""
    sparsity: Annotated[int, between(2, 1_000_000)] | Literal["sqrt"] = 6
    """For ``ternary``: s, with probability 1/s for each of +1 and -1; ``sqrt`` is the square root of the largest D."""
    a_basis: ABasis = "auto"
    """Distribution of A: ``same`` as the bases B_j (the paper; uniform with ``hadamard``), ``uniform``, or ``signs``
    (+1 and -1). ``auto`` takes ``signs`` with ``ternary``, because zero columns of A would reduce the rank, else
    ``same``."""
    init: Literal["gamma", "lambda"] = "gamma"
    """Factor that starts at zero; the other is constant: ``gamma`` (lambda = 1/max(n, r), as the official code: the
    first update has full rank) or ``lambda`` (gamma = 1/max(n, d), as PEFT: the first update has rank r)."""
    pairing: Pairing = "equation"
    """``equation`` pairs column (j, k) of B with row (j, k) of the scaled A, as equation 4; ``peft`` uses the column
    order of PEFT and of the official code."""
    variant: Literal["full", "a", "b"] = "full"
    """``full``; ``a`` sums the bases before the product (rank r, own A_j), so only r d + n r - r of its n (r + d)
    numbers are free; ``b`` has half the bases and so half the rank (Table 2)."""
    matched_rank: Count = 6
    """For variant ``a``: rank of the full RandLoRA whose count of trained numbers to match by choosing the number of
    bases."""
    memory: Literal["auto", "low", "fast"] = "auto"
    """``fast`` keeps a layer's adapted weight from the forward to the backward pass, and over micro-batches; ``low``
    builds it again; ``auto`` builds it again if that adds less than a twentieth to the time (multiplications on a CPU;
    also bytes and kernels on a GPU). All but ``low`` keep S over the uses of a step."""
    lead: Annotated[int, NotNegative] | dict[str, Annotated[int, NotNegative]] = 0
    """Number of leading terms with columns of their own, which files store: the rank of a LoRA that ``--from-form
    absorbed`` has put into them. Without one they are zero. A number, or numbers by pattern."""

    learning_rates = (1e-3, 1e-2, 1e-4)  # Table 8; section C.3; the released scripts
    group = "full rank"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lead and self.variant == "a":
            raise UserError("RandLoRA: variant a sums its bases, so it has no leading terms. Set variant to full or b.")

    def identity(self) -> dict[str, Any]:
        """Return `describe` without ``memory``, which affects speed only, and with the distribution of A."""
        described = super().identity()
        described["options"].pop("memory")
        a = self._basis_of_a()
        described["options"]["a_basis"] = "signs" if a == "binary" else a
        return described

    def _basis_of_a(self) -> Literal["uniform", "normal", "binary", "ternary"]:
        if self.a_basis == "signs" or (self.a_basis == "auto" and self.basis == "ternary"):
            return "binary"
        return "uniform" if self.a_basis == "uniform" or self.basis == "hadamard" else self.basis

    def rank_of(self, shape: WeightShape) -> int:
        """Return the rank r of the bases for one layer."""
        return self.check_rank(shape, self.of(self.rank, shape, 6))

    def bases_of(self, shape: WeightShape) -> int:
        """Return the number n of bases for one layer."""
        rank, small = self.rank_of(shape), shape.small
        number = self.of(self.num_bases, shape, "ceil")
        if isinstance(number, int):
            return number
        if self.variant == "a":
            full = -(-small // self.matched_rank) * (self.matched_rank + small)
            return max(1, round(full / (rank + small)))
        covered = 2 * rank if self.variant == "b" else rank
        return small // covered + 1 if number == "floor+1" else -(-small // covered)

    def leads_of(self, shape: WeightShape) -> int:
        """Return the number of leading terms for one layer, at most n."""
        lead, count = self.of(self.lead, shape, 0), self.bases_of(shape)
        if not 0 <= lead <= count:
            raise UserError(
                f"RandLoRA: lead is {lead}, but {shape.layer} has {count} bases. Lower the rank of RandLoRA, or keep "
                "the LoRA beside it (--from-form beside, in a sweep form: beside)."
            )
        return int(lead)

    def count(self, shape: WeightShape) -> int:
        """Return n (r + d)."""
        return self.bases_of(shape) * (self.rank_of(shape) + shape.small)

    def bases(self, shapes: list[WeightShape], device: torch.device) -> Bases:
        """Generate one A (r, d) and n bases B_j (D, r) at the largest r, d, D and n of the model."""
        large = max(shape.large for shape in shapes)
        small = max(shape.small for shape in shapes)
        rank = max(self.rank_of(shape) for shape in shapes)
        count = max(self.bases_of(shape) for shape in shapes)
        a_distribution = Distribution.make(self._basis_of_a(), self.sparsity, large)
        a = draw(self.key, "A", count if self.variant == "a" else 1, rank, small, a_distribution, device)
        if self.basis == "hadamard":
            rows = max(copies(shape.large, shape.small) * shape.small for shape in shapes)
            b = draw(self.key, "signs", 2, rows, 1, Distribution("binary"), device)
            return Bases(self.key, a, b, signs=True, structure=STRUCTURE)
        distribution = Distribution.make(self.basis, self.sparsity, large)
        b = draw(self.key, "B", count, large, rank, distribution, device)
        return Bases(self.key, a, b, signs=self.basis in ("binary", "ternary"))

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> DeltaWeight:
        """Create the update of one weight, with lambda (n, r) and gamma (n, d)."""
        assert bases is not None
        if lead := self.leads_of(shape):
            return LedRandLoRADelta(self, shape, weight, bases, lead)
        kind = SummedRandLoRADelta if self.variant == "a" else RandLoRADelta
        return kind(self, shape, weight, bases)
