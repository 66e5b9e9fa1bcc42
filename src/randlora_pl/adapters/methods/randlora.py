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
- A of two or three rows of signs: maybe slightly below d, as few columns are distinct; in practice not from rank 4 on.
- Hadamard: full by construction, also for each d x d block of rows (see `hadamard`).

PEFT keeps one pair of tensors per model: A (r, 1, m) and B (M, n, r), where m and M are the smaller and the larger of
the two maxima (largest output, largest input) of the adapted layers and n = m / r rounded up. A layer slices them and
pairs column p of ``B[:M, :n].flatten(1)`` with the row of A, lambda and gamma that has k = p // n and j = p % n.

An update that has absorbed a LoRA has leading columns. The first term of each of the first k bases has a column u_j (D)
of its own, and ones instead of the row of A:

    delta W = alpha/r * (sum_{j<=k} u_j lambda_j1 gamma_j + sum of B_jk lambda_jk A_k gamma_j over the other terms)

So a LoRA of rank k <= n is a value of lambda and gamma: with Q R = qr(B), the columns of Q and the rows of R A. Ones,
because entries of A near zero would need a huge gamma, by which the other terms of the basis would grow, too.
"""

from collections.abc import Callable, Hashable, Sequence
from statistics import mode
from typing import Annotated, Any, Literal, Self

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import (
    Adapter,
    DeltaWeight,
    FactoredDelta,
    Layers,
    Part,
    PeftContent,
    PeftFile,
    PeftForm,
    Rank,
    append_zeros,
    like,
    peft_number,
    plus_product,
)
from randlora_pl.adapters.kernels.basis_product import Form, Stored, scaled, stored
from randlora_pl.adapters.kernels.common import compute_dtype, drop_mask, enlarged, keep_scaling, masked
from randlora_pl.adapters.kernels.hadamard import STRUCTURE, Hadamard, copies
from randlora_pl.adapters.kernels.randlora_linear import NOTHING, AdaptedProduct, StepCache, SumOfBases, product
from randlora_pl.adapters.kernels.samples import Joint, add_factors, add_sums
from randlora_pl.adapters.random_bases import (
    Bases,
    Distribution,
    WeightShape,
    draw,
    draw_peft_randlora,
    peft_count,
    sides,
    trainable,
)
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Count, NotNegative, between

BasisName = Literal["uniform", "normal", "binary", "ternary", "hadamard"]


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
    a_basis: Literal["auto", "same", "uniform", "signs"] = "auto"
    """Distribution of A: ``same`` as the bases B_j (the paper; uniform with ``hadamard``), ``uniform``, or ``signs``
    (+1 and -1). ``auto`` is ``signs`` with ``ternary``, because zero columns of A would reduce the rank, else
    ``same``."""
    init: Literal["gamma", "lambda"] = "gamma"
    """Factor that starts at zero; the other is constant: ``gamma`` (lambda = 1/max(n, r), as the official code: the
    first update has full rank) or ``lambda`` (gamma = 1/max(n, d), as PEFT: the first update has rank r)."""
    pairing: Literal["equation", "peft"] = "equation"
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
    rebuilds it; ``auto`` rebuilds it if that adds less than a twentieth to the time (multiplications on a CPU;
    also bytes and kernels on a GPU). All but ``low`` keep S over the uses of a step."""
    lead: Annotated[int, NotNegative] | dict[str, Annotated[int, NotNegative]] = 0
    """Number of leading terms with columns of their own, which files store: the rank of a LoRA that ``--from-form
    absorbed`` has put into them. Without one they are zero. A number, or numbers by pattern."""

    learning_rates = (1e-3, 1e-2, 1e-4)  # Table 8; section C.3; the released scripts
    proportional_to = ("lambdas",)
    group = "full rank"
    neutral = ("memory",)  # affects speed only
    peft = PeftForm(
        "RANDLORA",
        frozenset(
            {
                *("r", "randlora_alpha", "randlora_dropout", "projection_prng_key", "save_projection"),
                *("sparse", "very_sparse"),
            }
        ),
        ("randlora_lambda", "randlora_gamma"),
        shared=("randlora_A", "randlora_B"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lead and self.variant == "a":
            raise UserError("RandLoRA: variant a sums its bases, so it has no leading terms. Set variant to full or b.")

    def identity(self) -> dict[str, Any]:
        """Return `describe` without ``memory``, and with the distribution of A."""
        described = super().identity()
        a = self._basis_of_a()
        described["options"]["a_basis"] = "signs" if a == "binary" else a
        return described

    def _basis_of_a(self) -> Literal["uniform", "normal", "binary", "ternary"]:
        if self.a_basis == "signs" or (self.a_basis == "auto" and self.basis == "ternary"):
            return "binary"
        return "uniform" if self.a_basis == "uniform" or self.basis == "hadamard" else self.basis

    def bases_of(self, shape: WeightShape) -> int:
        """Return the number n of bases for one layer."""
        rank, small = self.rank_of(shape), shape.small
        number = self.value("num_bases", shape)
        if isinstance(number, int):
            return number
        if self.variant == "a":
            full = -(-small // self.matched_rank) * (self.matched_rank + small)
            return max(1, round(full / (rank + small)))
        covered = 2 * rank if self.variant == "b" else rank
        return small // covered + 1 if number == "floor+1" else -(-small // covered)

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
        lead, count = int(self.value("lead", shape)), self.bases_of(shape)
        if not 0 <= lead <= count:
            raise UserError(
                f"RandLoRA: lead is {lead}, but {shape.layer} has {count} bases. Lower the rank of RandLoRA, or keep "
                "the LoRA as it is (--from-form beside, in a sweep form: beside)."
            )
        if lead:
            return LedRandLoRADelta(self, shape, weight, bases, lead)
        kind = SummedRandLoRADelta if self.variant == "a" else RandLoRADelta
        return kind(self, shape, weight, bases)

    def to_peft(self, parts: list[Part], bases: Bases | None) -> PeftFile:
        """Convert lambda and gamma: PEFT has one alpha, so lambda takes the ratio; extra bases are zero.

        Raises:
            UserError: PEFT cannot represent the bases.
        """
        shapes = [part.shape for part in parts]
        a, b = _arrange_for_peft(self, shapes, bases or self.bases(shapes, torch.device("cpu")))
        rank = self.rank_of(shapes[0])
        alphas = [float(self.value("alpha", shape)) for shape in shapes]
        alpha = mode([value for value in alphas if value] or [1.0])
        tensors = {"randlora_A": a, "randlora_B": b}
        for part, own in zip(parts, alphas, strict=True):
            count = peft_count(part.shape.small, rank)
            lambdas, gammas = (append_zeros(part.tensors[name], count) for name in ("lambdas", "gammas"))
            tensors[f"{part.path}.randlora_lambda"] = lambdas.T * (own / alpha)
            tensors[f"{part.path}.randlora_gamma"] = gammas
        config = {
            "r": rank,
            "randlora_alpha": peft_number(alpha),
            "sparse": False,
            "very_sparse": False,
            "randlora_dropout": self.dropout,
            "projection_prng_key": self.key,
            "save_projection": True,
            "init_weights": True,
        }
        return config, tensors

    @classmethod
    def from_peft(cls, content: PeftContent) -> tuple[Adapter, Layers, Bases]:
        """Convert PEFT's RandLoRA, whose bases are drawn again if they are not stored."""
        config, source, shapes = content.config, content.source, content.shapes
        rank, key = int(config["r"]), content.number("projection_prng_key", 0)
        ours = {
            layer: {"lambdas": own["randlora_lambda"].T, "gammas": own["randlora_gamma"]}
            for layer, own in content.layers.items()
        }
        for layer, own in ours.items():
            if len(own["gammas"]) != (count := peft_count(shapes[layer].small, rank)):
                raise UserError(f"{source}: {layer} has {len(own['gammas'])} bases; its size and r require {count}.")
        if (pair := content.shared) is None:
            sparse = {name: bool(config.get(name)) for name in ("sparse", "very_sparse")}
            pair = draw_peft_randlora(key, rank, list(shapes.values()), **sparse, dtype=content.dtype)
        a, b = (tensor.float() for tensor in pair)
        if a.dim() != 3 or b.dim() != 3 or a.shape[1] != 1:
            raise UserError(f"{source}: its bases have shapes {tuple(a.shape)} and {tuple(b.shape)}; copy it again.")
        small, large = (max(getattr(shape, side) for shape in shapes.values()) for side in ("small", "large"))
        a, b = a[..., :small], b[:large, : peft_count(small, rank)]  # PEFT stores more than any layer uses
        adapter = cls(
            rank=rank,
            alpha=content.number("randlora_alpha", 640.0),
            dropout=content.number("randlora_dropout", 0.0),
            init="lambda",
            pairing="peft",
            seed=key,
        )
        return adapter, ours, Bases(key, a.permute(1, 0, 2).contiguous(), b.permute(1, 0, 2), stored=True)


class _RandLoRATensors(DeltaWeight):
    """Lambda, gamma and the shared bases of one layer."""

    def __init__(self, adapter: RandLoRA, shape: WeightShape, weight: Tensor, bases: Bases) -> None:
        super().__init__(adapter.dropout)
        rank, count = adapter.rank_of(shape), adapter.bases_of(shape)
        starts = {"lambda": 1 / max(count, rank), "gamma": 1 / max(count, shape.small)} | {adapter.init: 0.0}
        self.lambdas = trainable(weight, count, rank, fill=starts["lambda"])
        self.gammas = trainable(weight, count, shape.small, fill=starts["gamma"])
        self.bases = bases
        self.large, self.small = shape.large, shape.small
        self.transposed = shape.out_features < shape.in_features
        self.pairing = adapter.pairing
        self.scaling = adapter.scaling_of(shape)
        self.structured = adapter.basis == "hadamard"
        self.keep = {"low": False, "fast": True}.get(adapter.memory)

    def scale(self) -> float:
        """Return the factor of lambda: scalings of the update and of the stored bases."""
        scaling: float = self.scaling * self.bases.scale
        return scaling

    def basis(self) -> Stored | Hadamard:
        """Return B of this layer."""
        count, rank = self.lambdas.shape
        if self.structured:
            return Hadamard(self.bases.B, self.large, self.small, count * rank, self.bases.copies)
        return stored(self.bases.B, self.large, count, rank, self.bases.copies, compute_dtype(self.lambdas))


class RandLoRADelta(_RandLoRATensors, Joint):
    """Update of equation 4 for one weight; trains ``lambdas`` (n, r) and ``gammas`` (n, d)."""

    def __init__(self, adapter: RandLoRA, shape: WeightShape, weight: Tensor, bases: Bases) -> None:
        super().__init__(adapter, shape, weight, bases)
        self.cache = StepCache()

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation, and drop what the layer keeps over the uses of a step."""
        self.cache.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.cache.clear()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def prepare(self, dtype: torch.dtype) -> None:
        """Make the shared copies of B for products in a dtype, which a compiled program can read but not make."""
        basis = self.basis()
        if isinstance(basis, Stored):
            basis.matrix(dtype)
            return
        for piece in basis.pieces:
            basis.signed_blocks(piece, dtype)
        basis.column_signs(self.lambdas.dtype)
        basis.orthogonal(basis.blocks, self.lambdas.dtype)
        basis.orthogonal(basis.block, torch.float32)  # read by Triton's kernels

    def trained(self) -> tuple[Tensor, Tensor]:
        """Return lambda (n, r) and gamma (n, d)."""
        return self.lambdas, self.gammas

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return lambda (n, r), gamma (n, d) and A (r, d)."""
        a = self.bases.A[0, : self.lambdas.shape[1], : self.small].to(self.lambdas.dtype)
        return *self.trained(), a

    def form(self, *scales: float) -> Form:
        """Return the properties of the sum besides its tensors; lambda has more factors if given."""
        dtype, scales = compute_dtype(self.lambdas), (self.scale(), *scales)
        return Form(dtype, self.pairing == "peft", self.large, self.small, self.transposed, self.keep, scales)

    def change(self, weight: Tensor) -> Tensor:
        """Return scale * sum_j B_j diag(lambda_j) A diag(gamma_j), (out, in)."""
        self.cache.clear()  # a layer that merges needs no more of it
        result: Tensor = SumOfBases.apply(*self.tensors(), self.basis(), self.form())  # type: ignore[no-untyped-call, unused-ignore]
        return result

    def add(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply W0 + delta in one product; the backward pass does not keep a gradient of the weight's size."""
        if torch.is_grad_enabled() and weight.requires_grad:
            return super().add(x, weight, bias)
        if self.drops:
            return self._product(x, weight, bias, drop_mask(x, self.dropout))
        return self._product(x, weight, bias)

    def contribution(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """Apply delta in one product, or in two with its bases if that takes fewer operations."""
        return self._product(self.dropped(x), None, None)

    def joint_key(self) -> Hashable:
        """Return a key of the bases, in the dtype that they get."""
        return type(self), id(self.bases), self.pairing, self.lambdas.shape, self.lambdas.dtype

    def add_joint(self, updates: Sequence[Self], x: Tensor, onto: Tensor) -> None:
        """Add each sample's sum, through the bases that all have."""
        lambdas, gammas, (a, *_) = zip(*(update.tensors() for update in updates), strict=True)
        scales = [(*update.form().scales, *enlarged(compute_dtype(x))) for update in updates]
        factors = torch.stack(list(map(scaled, lambdas, scales))), torch.stack(gammas), a
        add_sums(factors, self.basis(), self.pairing == "peft", self.transposed, x, onto)

    def _product(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None = None) -> Tensor:
        x = x.to(compute_dtype(x))
        scales = () if mask is None else (keep_scaling(x, self.dropout),)
        lambdas, bases, form = self.lambdas, self.bases, self.form(*scales)
        dtypes = form.dtype, lambdas.dtype
        frozen = self.cache.frozen(bases.A, bases.B, dtypes, lambda: (self.tensors()[2], self.basis()))
        held = NOTHING if self.keep is False else self.cache.begin(lambdas, self.gammas, frozen, self.training)
        if not torch.is_grad_enabled():
            a, basis = frozen
            return product(x, weight, bias, (*self.trained(), a), basis, form, False, mask, held)[0]
        inputs = (x, weight, bias, *self.trained(), *frozen, form, mask, held)
        result: Tensor = AdaptedProduct.apply(*inputs)  # type: ignore[no-untyped-call, unused-ignore]
        return result


class SummedRandLoRADelta(_RandLoRATensors, FactoredDelta):
    """RandLoRA-a of Table 2, (sum_j B_j diag(lambda_j)) (sum_j A_j diag(gamma_j)): rank r at any n."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the two sums, transposed if the weight is wider than tall."""
        count, rank = self.lambdas.shape
        dtype, basis = self.lambdas.dtype, self.basis()
        if isinstance(basis, Hadamard):
            b = basis.matrix(dtype).view(self.large, count, rank)
        else:
            b = self.bases.B[: self.large, :count, :rank].to(dtype)
        a = self.bases.A[:count, :rank, : self.small].to(dtype)
        left = torch.einsum("Dnr,nr->Dr", b, self.lambdas * self.scale())
        right = torch.einsum("nrd,nd->rd", a, self.gammas)
        return (right.T, left.T) if self.transposed else (left, right)


class LedRandLoRADelta(RandLoRADelta):
    """Update of one weight with ``lead`` (D, k), zero until `absorb` sets it; the other terms keep their fast path."""

    kept = ("lead",)
    lead: Tensor
    others: Tensor

    def __init__(self, adapter: RandLoRA, shape: WeightShape, weight: Tensor, bases: Bases, number: int) -> None:
        super().__init__(adapter, shape, weight, bases)
        others = torch.ones_like(self.lambdas.detach())
        others[:number, 0] = 0
        self.register_buffer("others", others, persistent=False)
        self.register_buffer("lead", self.gammas.new_zeros(self.large, number))

    def trained(self) -> tuple[Tensor, Tensor]:
        """Return lambda (n, r) with zeros for the leading terms, and gamma (n, d)."""
        return self.lambdas * self.others, self.gammas

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return P (out, k) and Q (k, in), whose product is the sum of the leading terms, with the scaling."""
        number = self.lead.shape[1]
        rows = self.gammas[:number] * (self.lambdas[:number, :1] * self.scaling)
        return (rows.T, self.lead.T) if self.transposed else (self.lead, rows)

    def change(self, weight: Tensor) -> Tensor:
        """Return the whole sum, (out, in)."""
        p, q = self.factors()
        return super().change(weight) + p @ q

    def add_joint(self, updates: Sequence[Self], x: Tensor, onto: Tensor) -> None:
        """Add the whole sum of each sample."""
        super().add_joint(updates, x, onto)
        add_factors([update.factors() for update in updates], x, onto)

    def _product(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None = None) -> Tensor:
        output = super()._product(x, weight, bias, mask)
        p, q = self.factors()
        q = q if mask is None else q * keep_scaling(x, self.dropout)
        return plus_product(output, nn.functional.linear(masked(x, mask), like(q, x)), p)

    @torch.no_grad()
    def absorb(self, b: Tensor, a: Tensor) -> None:
        """Set the update to B A, for the scaled B (out, k) and A (k, in) of a LoRA; the other bases stay.

        All tensors have a gradient then: lambda_j1 is 1, and the other lambda of the first k bases are zero.
        """
        left, right = (a.T, b.T) if self.transposed else (b, a)
        columns, triangle = torch.linalg.qr(left.detach().to("cpu", torch.float64))
        number = len(triangle)
        self.lead.copy_(columns)
        self.lambdas[:number] = 1 - self.others[:number]
        self.gammas[:number] = (triangle @ right.detach().to(triangle) / self.scaling).to(self.gammas)


def of_official_code(rank: int, alpha: float, seed: int) -> RandLoRA:
    """Return the RandLoRA whose tensors a checkpoint of the official vision code has."""
    return RandLoRA(rank=rank, alpha=alpha, num_bases="floor+1", pairing="peft", seed=seed)


def _arrange_for_peft(adapter: RandLoRA, shapes: Sequence[WeightShape], bases: Bases) -> tuple[Tensor, Tensor]:
    """Convert our bases to PEFT's A (r, 1, m) and B (M, n, r), so that the same lambda and gamma give the same update.

    If PEFT's order or number of bases differs, the columns of B are permuted, and missing bases are zero. There is one
    permutation for all layers, so they must then have the same numbers of bases.
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
    equation = adapter.pairing == "equation"
    straight = not equation and all(adapter.bases_of(shape) == peft_count(shape.small, rank) for shape in shapes)
    if not straight and (len(counts) > 1 or len(theirs) > 1):
        why = "pairing: equation permutes" if equation else f"num_bases: {adapter.num_bases} rearranges"
        hint = "train a RandLoRA with --model.adapter.pairing peft" if equation else ""
        raise UserError(f"its layers have {_listed(counts)} bases, and {why} all of them alike", hint)
    if not straight and counts[0] > theirs[0]:
        raise UserError(f"it has {counts[0]} bases of rank {rank}; PEFT makes {theirs[0]}")
    smalls = sorted({shape.small for shape in shapes})
    if structured and len(smalls) > 1:
        raise UserError(f"hadamard bases differ for the smaller sides {_listed(smalls)}; PEFT shares them")
    small, large = sorted(sides(shapes))
    a = bases.A[0, :rank].float().cpu()
    if structured:
        depth = max(shape.large for shape in shapes)
        signs = bases.B[..., 0].cpu()
        b = Hadamard(signs, depth, smalls[0], counts[-1] * rank).matrix(torch.float32).view(depth, counts[-1], rank)
    else:
        b = bases.B[:, :, :rank].float().cpu() * bases.scale
    if not straight:  # column k N + j belongs to row (k, j), and is zero for j >= n
        own = counts[0]
        k, j = torch.arange(rank)[:, None], torch.arange(own)
        order = j * rank + k if equation else k * own + j  # our column for row (k, j)
        ordered = b.new_zeros(len(b), rank, theirs[0])
        ordered[:, :, :own] = b[:, :own].flatten(1)[:, order]
        b = ordered.reshape(len(b), theirs[0], rank)
    # Cut, or padded with zeros that no layer reads.
    more = peft_count(small, rank) - b.shape[1], large - len(b)
    return nn.functional.pad(a[:, None], (0, small - a.shape[1])), nn.functional.pad(b, (0, 0, 0, more[0], 0, more[1]))


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:-1])) + f" and {values[-1]}" if len(values) > 1 else str(values[0])
