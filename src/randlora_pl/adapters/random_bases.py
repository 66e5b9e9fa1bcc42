"""Weights to adapt, and random tensors for them: every entry is a pure function of (seed, tensor, j, row, column).

An entry does not depend on the allocated size, the device, the number of threads or the version of PyTorch. Philox
words (:mod:`randlora_pl.utils.rng`) are converted with integer arithmetic and correctly rounded IEEE operations only
(+, -, *, /, each as a separate kernel, so that no compiler can fuse them), because PyTorch's logarithm and square root
differ between builds in the last bit. Each distribution is scaled to unit standard deviation by its analytic variance;
the official code uses the empirical one (protocol: "entries scaled to unit std").

`Copies` holds tensors that are computed from another one.
"""

import hashlib
import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from randlora_pl.utils.rng import philox, stream

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class WeightShape:
    """Shape of a weight to adapt: name of the layer, and (out, in) as in ``nn.Linear.weight``."""

    layer: str
    out_features: int
    in_features: int

    @property
    def large(self) -> int:
        """Larger side D."""
        return max(self.out_features, self.in_features)

    @property
    def small(self) -> int:
        """Smaller side d."""
        return min(self.out_features, self.in_features)


def sides(shapes: Sequence[WeightShape]) -> tuple[int, int]:
    """Return the largest output and the largest input of the layers."""
    return max(shape.out_features for shape in shapes), max(shape.in_features for shape in shapes)


def matches(pattern: str, layer: str) -> bool:
    """Return True if a regular expression matches a layer's full name, or the full part after any dot."""
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", layer) is not None


def by_pattern(values: Mapping[str, Number]) -> dict[str, Number]:
    """Return patterns of layer names with one number each."""
    groups: dict[Number, list[str]] = {}
    for layer, value in values.items():
        groups.setdefault(value, []).append(layer)
    return {f"^{exact_pattern(layers)}": value for value, layers in groups.items()}


def per_layer(values: Mapping[str, Number]) -> Number | dict[str, Number]:
    """Return one number, or patterns of layer names with one number each."""
    patterns = by_pattern(values)
    return next(iter(patterns.values())) if len(patterns) == 1 else patterns


def exact_pattern(names: Iterable[str]) -> str:
    r"""Return a regular expression whose full matches are exactly these names.

    Examples:
        ``blocks.0.fc1 blocks.1.fc1 blocks.0.fc2 blocks.1.fc2`` give ``blocks\.(?:0|1)(?:\.fc1|\.fc2)``.
    """
    numbers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(|.*?\.)(\d+)(\..*)", name)
        before, number, after = match.groups() if match else (name, "", "")
        numbers.setdefault((before, after), []).append(number)
    ends: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (before, after), own in numbers.items():
        ends.setdefault((before, tuple(own)), []).append(after)
    return _any(re.escape(before) + _any(own) + _any(map(re.escape, after)) for (before, own), after in ends.items())


def _any(patterns: Iterable[str]) -> str:
    choices = list(patterns)
    return choices[0] if len(choices) == 1 else f"(?:{'|'.join(choices)})"


class Copies:
    """Tensors computed from one source, by key, on its device.

    They are made again if the source moves or changes. Pickling and `copy.deepcopy` leave them out. Nothing is stored
    while a tracer records: a compiled program reads what an earlier call has stored as one of its inputs.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Tensor] = {}
        self._source: tuple[Any, ...] = (None, ())

    def get(self, key: Hashable, source: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """Return the tensor of a key, computed by ``make`` at its first use."""
        if torch.compiler.is_compiling():
            made = self._made.get(key)
            return make() if made is None or made.device != source.device else made
        if self._source[1] != (now := stamp(source)):
            self._made, self._source = {}, (source, now)
        made = self._made.get(key)
        if made is None:
            with torch.inference_mode(False), torch.no_grad():
                made = make()
            if storable(made, source):
                self._made[key] = made
        return made

    def clear(self) -> None:
        """Drop all tensors."""
        self._made, self._source = {}, (None, ())

    def __len__(self) -> int:
        return len(self._made)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Copies, ())


def stamp(*tensors: Tensor) -> tuple[int, ...]:
    """Return numbers that differ if tensors are others, while these exist, or if their storage or values changed.

    A change through ``.data`` in place is not seen, nor one of tensors that were made in `torch.inference_mode`.
    """
    numbers: list[int] = []
    for each in tensors:
        real = type(each) in (Tensor, nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(each)
        version = -1 if each.is_inference() else each._version
        numbers += id(each), version, each.data_ptr() if real else 0
    return tuple(numbers)


def storable(made: Tensor, source: Tensor) -> bool:
    """Return True if a tensor is of the source's kind: not made by a tracer from a source that exists without it."""
    traced = torch._C._get_tracing_state() is not None or torch._C._functorch.maybe_current_level() is not None
    mode = getattr(made, "fake_mode", None)
    return not traced and mode is getattr(source, "fake_mode", None) and (mode is not None or type(made) is Tensor)


GENERATOR = "philox4x32-10/1"
"""Name and version of the generator, stored in every adapter file; changes whenever any bit would change."""

STORED = "stored"
"""Value instead of the generator for adapters that store bases which no seed generates."""

BasisName = Literal["uniform", "normal", "binary", "ternary"]
_CHUNK = 1 << 21  # counters per step: limits the int64 temporaries to about 200 MB


@dataclass(frozen=True)
class Distribution:
    """Conversion of a 32-bit word to an entry of unit standard deviation.

    Attributes:
        basis: ``uniform`` on +-sqrt(3), ``normal``, ``binary`` (+-1) or ``ternary`` (+-sqrt(s/2) with
            probability 1/s each, else 0: equation of the paper's section C.6).
        threshold: For ``ternary``: +1 and -1 take this many of the 2**32 words each.
    """

    basis: BasisName
    threshold: int = 0

    @classmethod
    def make(cls, basis: BasisName, sparsity: int | Literal["sqrt"], largest: int) -> "Distribution":
        """Create a distribution, for ``ternary`` with probability 1/s for each of +1 and -1.

        Args:
            basis: Kind of the entries.
            sparsity: For ``ternary``: s, from 2 to a million; ``"sqrt"`` is the square root of ``largest``.
            largest: The largest D of the model.
        """
        if basis != "ternary":
            return cls(basis)
        if sparsity == "sqrt":
            return cls(basis, math.isqrt((1 << 64) // largest))
        return cls(basis, (1 << 32) // sparsity)

    def __call__(self, words: Tensor) -> Tensor:
        """Convert uniform 32-bit words (int64, any shape) to float32 entries of unit variance."""
        if self.basis == "uniform":
            # The odd integers from -(2**24 - 1) to 2**24 - 1 are exact in float32; their variance is (4**24 - 1) / 3.
            odd = (words >> 8) * 2 + (1 - (1 << 24))
            return odd.to(torch.float32) * (1 / math.sqrt(((1 << 48) - 1) / 3))
        if self.basis == "normal":
            return _normal_quantile(words).to(torch.float32)
        if self.basis == "binary":
            return ((words >> 31) * 2 - 1).to(torch.float32)
        signs = (words >= (1 << 32) - self.threshold).to(torch.float32) - (words < self.threshold).to(torch.float32)
        return signs * (1 / math.sqrt(2 * self.threshold / (1 << 32)))


_faster: ContextVar[torch.device | None] = ContextVar("_faster", default=None)


@contextmanager
def drawn_on(device: torch.device | None) -> Iterator[None]:
    """Draw on this device what `draw` would draw on a CPU, to the same bits; a core draws 2 to 15 million a second."""
    before = _faster.set(device)
    try:
        yield
    finally:
        _faster.reset(before)


@torch.no_grad()
def draw(
    seed: int, tensor: str, count: int, rows: int, columns: int, distribution: Distribution, device: torch.device
) -> Tensor:
    """Generate float32 matrices (count, rows, columns) whose entries are functions of (seed, tensor, j, row, column).

    Args:
        seed: Seed of the adapter.
        tensor: Name of the tensor, for example ``"A"``.
        count: Number of matrices.
        rows: Rows of each matrix.
        columns: Columns of each matrix.
        distribution: Distribution of the entries.
        device: Device of the result; ``meta`` allocates nothing.
    """
    if device.type == "meta":
        return torch.empty(count, rows, columns, dtype=torch.float32, device=device)
    if device.type == "cpu" and (faster := _faster.get()) is not None:
        return draw(seed, tensor, count, rows, columns, distribution, faster).to(device)
    blocks = -(-columns // 4)  # one Philox call gives the entries of four adjacent columns
    block = torch.arange(blocks, device=device)
    row = torch.arange(rows, device=device)[:, None]
    name = torch.tensor(stream(tensor), device=device)
    result = torch.empty(count, rows, columns, dtype=torch.float32, device=device)
    step = max(1, _CHUNK // (rows * blocks))
    for start in range(0, count, step):
        j = torch.arange(start, min(start + step, count), device=device)[:, None, None]
        lanes = torch.stack(philox(seed, (block, row, j, name)), dim=-1)
        result[start : start + step] = distribution(lanes.flatten(-2)[..., :columns])
    return result


def random_pair(key: int, count: int, shapes: Sequence[WeightShape], rank: int, device: torch.device) -> "Bases":
    """Generate A (count, rank, in) and B (count, out, rank) at the largest sizes of weights, of unit deviation."""
    rows, columns = sides(shapes)
    uniform = Distribution("uniform")
    a = draw(key, "A", count, rank, columns, uniform, device)
    return Bases(key, a, draw(key, "B", count, rows, rank, uniform, device))


class Bases(nn.Module):
    """Frozen random tensors that all layers of a model share, stored once and not in checkpoints.

    All layers have the same module, so that ``.to()``, ``deepcopy`` and pickling keep one copy. They stay in float32 if
    the model's dtype changes (``model.bfloat16()``), because rounding would change the bases.

    Args:
        seed: Seed of the bases.
        a: (count_a, r, d).
        b: (count_b, D, r).
        signs: True if the entries of ``b`` are -1, 0 and 1 times one number; they are stored in 8 bits then.
        structure: Name of the structure that is built from ``b``; "" if ``b`` contains the bases.
        stored: True if the bases come from a file instead of the seed.

    Attributes:
        A: (count_a, r, d), the factor on the smaller (or input) side.
        B: (D, count_b, r), rows first, so that the flattened slice of a layer, ``B[:D].flatten(1)``, is a view.
        scale: Factor of the stored entries of B.
        fingerprint: SHA-256 of generator, seed, shapes and bits; empty on the meta device.
        copies: B in the dtypes and layouts of products, made at their first use.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0

    def __init__(
        self, seed: int, a: Tensor, b: Tensor, signs: bool = False, structure: str = "", stored: bool = False
    ) -> None:
        super().__init__()
        self.fingerprint = "" if a.is_meta else fingerprint(seed, a, b, structure=structure, stored=stored)
        if signs:
            self.scale = 1.0 if b.is_meta else b.abs().max().item()
            b = b.sign().to(torch.int8)
        self.copies = Copies()
        self.register_buffer("A", a, persistent=False)
        b = b.permute(1, 0, 2)
        b = b.clone(memory_format=torch.contiguous_format)  # `contiguous` may keep strides of size-1 dims
        self.register_buffer("B", b, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.copies.clear()
        bits = (self.A, self.B)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.A, self.B = (
            moved if moved.dtype == kept.dtype else kept.to(moved.device)
            for moved, kept in zip((self.A, self.B), bits, strict=True)
        )
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return ``A`` and ``B`` (count_b, D, r) for a file, in the smallest dtype without rounding."""
        together = {"A": self.A, "B": self.B.permute(1, 0, 2) * self.scale}
        tensors = {}
        for name, tensor in together.items():
            exact = tensor.detach().cpu()
            halves = (exact.to(dtype) for dtype in (torch.bfloat16, torch.float16))
            tensors[name] = next((half for half in halves if torch.equal(half.to(exact.dtype), exact)), exact)
        return tensors

    def extra_repr(self) -> str:
        """Return the shapes and the first digits of the fingerprint."""
        return f"A={tuple(self.A.shape)}, B={tuple(self.B.shape)}, fingerprint={self.fingerprint[:12]}"


def fingerprint(seed: int, *tensors: Tensor, structure: str = "", stored: bool = False) -> str:
    """Return the SHA-256 of generator, structure, seed and the little-endian float32 bits of the tensors.

    For stored bases, generator and seed are not included.
    """
    source = STORED if stored else f"{GENERATOR}:{structure}:{seed}" if structure else f"{GENERATOR}:{seed}"
    digest = hashlib.sha256(source.encode())
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Evaluate a polynomial by Horner's rule, highest power first, with each operation rounded separately."""
    result = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x
        result = result + coefficient
    return result


def _log(x: Tensor) -> Tensor:
    """Compute the natural logarithm in float64 from correctly rounded operations, so that all platforms agree."""
    mantissa, exponent = torch.frexp(x)
    z = (mantissa - 1) / (mantissa + 1)
    series = _polynomial(z * z, tuple(2.0 / power for power in range(37, 0, -2)))
    return series * z + exponent.to(torch.float64) * math.log(2)


def _square_root(x: Tensor) -> Tensor:
    """Compute the square root by Heron's method, accurate to one ulp for x in [0.5, 30]."""
    root = 1 + x * 0.25
    for _ in range(6):
        root = (root + x / root) * 0.5
    return root


# Coefficients of the normal quantile PPND16 (Wichura, algorithm AS 241, Applied Statistics 37, 1988),
# highest power first: numerator and denominator for the center, the shoulders and the tails.
_CENTRE = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
     13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
     5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0),
)  # fmt: skip
_SHOULDER = (
    (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
     3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
     0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0),
)  # fmt: skip
_TAIL = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093,
     0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772),
    (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
     0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0),
)  # fmt: skip


def _normal_quantile(words: Tensor) -> Tensor:
    """Return standard normal deviates in float64 by inversion of (word + 1/2) / 2**32."""
    p = (words.to(torch.float64) + 0.5) / float(1 << 32)
    q = p - 0.5
    r = 0.180625 - q * q
    centre = _polynomial(r, _CENTRE[0]) / _polynomial(r, _CENTRE[1]) * q
    r = _square_root(-_log(torch.minimum(p, 1 - p)))
    shoulder = _polynomial(r - 1.6, _SHOULDER[0]) / _polynomial(r - 1.6, _SHOULDER[1])
    tail = _polynomial(r - 5.0, _TAIL[0]) / _polynomial(r - 5.0, _TAIL[1])
    outer = torch.where(r <= 5.0, shoulder, tail) * torch.sign(q)
    return torch.where(q.abs() <= 0.425, centre, outer)


def trainable(weight: Tensor, *shape: int, fill: float | None = None) -> nn.Parameter:
    """Create a parameter on the device of ``weight``, in float32 unless the weight is float64."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if fill is None:
        return nn.Parameter(torch.empty(*shape, dtype=dtype, device=weight.device))
    return nn.Parameter(torch.full(shape, fill, dtype=dtype, device=weight.device))


def draw_parameter(
    weight: Tensor, key: int, name: str, rows: int, columns: int, basis: BasisName, deviation: float
) -> nn.Parameter:
    """Create a parameter (rows, columns) as `trainable`, random as a function of key and name alone."""
    parameter = trainable(weight, rows, columns)
    with torch.no_grad():
        parameter.copy_(draw(key, name, 1, rows, columns, Distribution(basis), weight.device)[0] * deviation)
    return parameter


def kaiming(weight: Tensor, key: int, name: str, rows: int, columns: int) -> nn.Parameter:
    """Create a parameter that is uniform on +-1/sqrt(columns), as of kaiming_uniform_(a=sqrt(5)); see `drawn`."""
    return draw_parameter(weight, key, name, rows, columns, "uniform", 1 / math.sqrt(3 * columns))


def peft_count(small: int, rank: int) -> int:
    """Return PEFT's number of bases for a smaller side: small / rank, rounded up."""
    return -(-small // rank)


def draw_peft_randlora(
    key: int,
    rank: int,
    shapes: Sequence[WeightShape],
    *,
    sparse: bool = False,
    very_sparse: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Draw the bases of a RandLoRA adapter that PEFT saved without them (``save_projection=False``).

    Args:
        key: ``projection_prng_key``.
        rank: ``r``.
        shapes: Shapes of the adapted layers.
        sparse: Ternary entries; +1 and -1 have probability 1/6 each.
        very_sparse: Ternary entries; +1 and -1 have probability 1/(2 sqrt(m)) each. Overrides ``sparse``.
        dtype: Dtype in which PEFT drew dense bases: bfloat16, or float16 on machines without it (macOS before 14, old
            GPUs). Except for tiny layers the two draws are unrelated, and a PEFT file does not store which was used.

    Returns:
        A (r, 1, m) and B (M, n, r), float32, of unit standard deviation.
    """
    small, large = sorted(sides(shapes))
    generator, count = torch.Generator("cpu").manual_seed(key), peft_count(small, rank)
    if sparse or very_sparse:
        half = 1 / (2 * (math.sqrt(small) if very_sparse else 3))
        pair = []
        for shape in ((rank, 1, small), (large, count, rank)):  # by thresholds on uniform numbers
            numbers = torch.rand(shape, generator=generator)
            signs = (numbers > 1 - half).float() - (numbers < half).float()
            pair.append(signs / signs.std())
        return pair[0], pair[1]

    def uniform(*shape: int) -> Tensor:
        return torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=dtype), a=math.sqrt(5), generator=generator)

    a = uniform(rank, 1, small)  # in this order
    b = torch.cat([uniform(large, 1, rank) for _ in range(count)], dim=1)
    return (a / a.std()).float(), (b / b.std()).float()


def draw_peft_vera(key: int, rank: int, shapes: Sequence[WeightShape]) -> tuple[Tensor, Tensor]:
    """Draw A (r, largest input) and B (largest output, r) of a VeRA that PEFT saved without them, float32.

    Kaiming-uniform with gain sqrt(2): uniform on +-sqrt(6 / columns).
    """
    rows, columns = sides(shapes)
    generator = torch.Generator("cpu").manual_seed(key)

    def uniform(*shape: int) -> Tensor:
        # Compute the bound in the order of torch.nn.init: different rounding would give different bits.
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    a = uniform(rank, columns)
    return a, uniform(rows, rank)
