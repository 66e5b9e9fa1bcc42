"""Slow and obvious versions of every method, written from the formulas one term at a time, in float64.

They know nothing of slices, factors, autograd or fast paths, and stay beside the fast ones for ever.
"""

import hashlib
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from randlora_pl.adapters import random_bases as bases
from randlora_pl.adapters.base import DeltaWeight
from randlora_pl.adapters.layers import RowBlocks
from randlora_pl.adapters.methods.adalora import AdaLoRADelta
from randlora_pl.adapters.methods.autolora import SelectedBases, SelectedRanks
from randlora_pl.adapters.methods.kradapter import KRAdapterDelta
from randlora_pl.adapters.methods.lora import HydraLoRADelta, LoRADelta
from randlora_pl.adapters.methods.multiplied import HiRADelta, OFTDelta
from randlora_pl.adapters.methods.nested import DoRADelta, TogetherDelta
from randlora_pl.adapters.methods.randlora import LedRandLoRADelta, RandLoRADelta, SummedRandLoRADelta
from randlora_pl.adapters.methods.random_matrices import NoLADelta, PRANCDelta, VeRADelta
from randlora_pl.adapters.methods.shira import SHiRADelta
from randlora_pl.adapters.methods.singular import LoRAXSDelta, MinorDelta, PiSSADelta, SVFTDelta
from randlora_pl.utils.rng import stream

Matrix = list[list[float]]


def zeros(rows: int, columns: int) -> Matrix:
    return [[0.0] * columns for _ in range(rows)]


def add_outer(matrix: Matrix, factor: float, column: list[float], row: list[float]) -> None:
    """matrix += factor * column row, entry by entry."""
    for i, left in enumerate(column):
        for j, right in enumerate(row):
            matrix[i][j] += factor * left * right


def product(left: Matrix, right: Matrix) -> Matrix:
    result = zeros(len(left), len(right[0]))
    for k, row in enumerate(right):
        add_outer(result, 1.0, [line[k] for line in left], row)
    return result


def together(parts: list[Matrix]) -> Matrix:
    """The sum of the parts' updates, entry by entry."""
    return [[sum(values) for values in zip(*lines, strict=True)] for lines in zip(*parts, strict=True)]


def transpose(matrix: Matrix) -> Matrix:
    return [list(column) for column in zip(*matrix, strict=True)]


def randlora(a: Matrix, b: list[Matrix], lam: Matrix, gam: Matrix, scale: float) -> Matrix:
    """Equation 4: scale * sum_j B_j diag(lambda_j) A diag(gamma_j); B_j is (D, r), A (r, d)."""
    result = zeros(len(b[0]), len(a[0]))
    for j, basis in enumerate(b):
        for k, row in enumerate(a):
            scaled = [value * gam[j][i] for i, value in enumerate(row)]
            add_outer(result, scale * lam[j][k], [line[k] for line in basis], scaled)
    return result


def randlora_peft(a: Matrix, b: list[Matrix], lam: Matrix, gam: Matrix, scale: float) -> Matrix:
    """As PEFT and the official code pair them: column (p // r, p % r) of B with row (p % n, p // n) of the rest."""
    count, rank = len(b), len(a)
    result = zeros(len(b[0]), len(a[0]))
    for p in range(count * rank):
        j, k = p % count, p // count
        scaled = [value * gam[j][i] for i, value in enumerate(a[k])]
        add_outer(result, scale * lam[j][k], [line[p % rank] for line in b[p // rank]], scaled)
    return result


def randlora_a(a: list[Matrix], b: list[Matrix], lam: Matrix, gam: Matrix, scale: float) -> Matrix:
    """Table 2, RandLoRA-a: scale * (sum_j B_j diag(lambda_j)) (sum_j A_j diag(gamma_j))."""
    left, right = zeros(len(b[0]), len(lam[0])), zeros(len(a[0]), len(gam[0]))
    for j in range(len(b)):
        for i, line in enumerate(b[j]):
            for k, value in enumerate(line):
                left[i][k] += scale * value * lam[j][k]
        for k, line in enumerate(a[j]):
            for i, value in enumerate(line):
                right[k][i] += value * gam[j][i]
    return product(left, right)


def lora(a: Matrix, b: Matrix, scale: float) -> Matrix:
    """Scale * B A."""
    return product([[scale * value for value in line] for line in b], a)


def pissa(a: Matrix, b: Matrix, first_a: Matrix, first_b: Matrix, scale: float) -> Matrix:
    """Scale * (B A - B0 A0)."""
    now, first = lora(a, b, scale), lora(first_a, first_b, scale)
    return [[x - y for x, y in zip(*lines, strict=True)] for lines in zip(now, first, strict=True)]


def adalora(a: Matrix, e: list[float], b: Matrix, scale: float) -> Matrix:
    """Scale * B diag(E) A."""
    result = zeros(len(b), len(a[0]))
    for k, row in enumerate(a):
        add_outer(result, scale * e[k], [line[k] for line in b], row)
    return result


def vera(a: Matrix, b: Matrix, vector_b: list[float], vector_d: list[float], scale: float) -> Matrix:
    """Scale * diag(b) B diag(d) A."""
    result = zeros(len(b), len(a[0]))
    for i in range(len(b)):
        for j in range(len(a[0])):
            result[i][j] = scale * vector_b[i] * sum(b[i][k] * vector_d[k] * a[k][j] for k in range(len(a)))
    return result


def nola(a: list[Matrix], b: list[Matrix], alphas: list[float], betas: list[float], scale: float) -> Matrix:
    """Scale * (sum_i beta_i B_i) (sum_i alpha_i A_i)."""
    left, right = zeros(len(b[0]), len(b[0][0])), zeros(len(a[0]), len(a[0][0]))
    for total, terms, coefficients in ((left, b, betas), (right, a, alphas)):
        for term, coefficient in zip(terms, coefficients, strict=True):
            for i, line in enumerate(term):
                for j, value in enumerate(line):
                    total[i][j] += coefficient * value
    return lora(right, left, scale)


def pranc_matrices(seed: int, form: str, count: int, rows: int, columns: int) -> list[Matrix]:
    """The R_i (rows, columns) of PRANC: signs, or for ``shared`` the square root of ``count`` at some entries."""
    result = [zeros(rows, columns) for _ in range(count)]
    if form == "dense":
        for i, row, block in itertools.product(range(count), range(rows), range(0, columns, 32)):
            word = basis_word(seed, "signs of PRANC", i, row, block // 32)
            for column in range(block, min(block + 32, columns)):
                result[i][row][column] = 1.0 if word >> column % 32 & 1 else -1.0
        return result
    for block in range(-(-rows * columns // count)):
        words = [basis_word(seed, "places of PRANC", 0, block, i) for i in range(count)]
        order = sorted(range(count), key=lambda i: words[i] >> 1)
        for entry, i in enumerate(order[: rows * columns - block * count], block * count):
            # the sign is that of the place in the block, not of the coefficient
            sign = -1.0 if words[entry % count] & 1 else 1.0
            result[i][entry // columns][entry % columns] = sign * math.sqrt(count)
    return result


def pranc(matrices: list[Matrix], alphas: list[float], scale: float) -> Matrix:
    """Scale / sqrt(k) * sum_i alpha_i R_i."""
    result = zeros(len(matrices[0]), len(matrices[0][0]))
    for matrix, alpha in zip(matrices, alphas, strict=True):
        for total, row in zip(result, matrix, strict=True):
            for column, value in enumerate(row):
                total[column] += scale / math.sqrt(len(alphas)) * alpha * value
    return result


def kradapter(u: Matrix, v: Matrix, alpha: float, rows: int, columns: int) -> Matrix:
    """X[p, b r + a] = alpha V[p, b] U[p, a], cut to the longer side, and transposed if there are more rows."""
    long, rank = max(rows, columns), len(u[0])
    result = [[alpha * v[p][k // rank] * u[p][k % rank] for k in range(long)] for p in range(len(u))]
    return transpose(result) if rows > columns else result


def shira(places: list[int], values: list[float], rows: int, columns: int) -> Matrix:
    """The values at their places, which count along the rows."""
    result = zeros(rows, columns)
    for place, value in zip(places, values, strict=True):
        result[place // columns][place % columns] = value
    return result


def distinct_integers(seed: int, name: str, count: int, size: int) -> list[int]:
    """The first different integers of the stream; the others if these are fewer."""
    if 2 * count > size:
        others = set(distinct_integers(seed, name, size - count, size))
        return [number for number in range(size) if number not in others]
    found: set[int] = set()
    for draw in itertools.count():
        words = philox((seed & 0xFFFFFFFF, seed >> 32), (draw, 0, 0, stream(name)))
        for high, low in (words[:2], words[2:]):
            if len(found) == count:
                return sorted(found)
            found.add(((high << 30) | (low >> 2)) % size)
    raise AssertionError


def svft(u: Matrix, v: Matrix, places: list[int], values: list[float]) -> Matrix:
    """U M V, with the values of M at the places p m + q."""
    result = zeros(len(u), len(v[0]))
    for place, value in zip(places, values, strict=True):
        p, q = divmod(place, len(v))
        add_outer(result, value, [row[p] for row in u], v[q])
    return result


def dora(weight: Matrix, delta: Matrix, magnitude: list[float]) -> Matrix:
    """m * (W0 + delta) / ||W0 + delta||, row by row: the adapted weight itself."""
    result = []
    for row, change, size in zip(weight, delta, magnitude, strict=True):
        summed = [x + y for x, y in zip(row, change, strict=True)]
        norm = math.sqrt(sum(value * value for value in summed))
        result.append([size * value / norm for value in summed])
    return result


def hydralora(x: list[float], a: Matrix, heads: list[Matrix], router: Matrix, scale: float) -> list[float]:
    """Scale * sum_k w_k(x) B_k A x with w(x) = softmax(W_g x), for one token."""
    scores = [math.exp(sum(weight * value for weight, value in zip(row, x, strict=True))) for row in router]
    hidden = [sum(weight * value for weight, value in zip(row, x, strict=True)) for row in a]
    result = [0.0] * len(heads[0])
    for head, score in zip(heads, scores, strict=True):
        for i, row in enumerate(head):
            result[i] += scale * score / sum(scores) * sum(u * v for u, v in zip(row, hidden, strict=True))
    return result


def hira(weight: Matrix, a: Matrix, b: Matrix) -> Matrix:
    """W0 o (B A): each entry of W0 times a sum over the rank."""
    result = zeros(len(weight), len(weight[0]))
    for i, line in enumerate(weight):
        for j, value in enumerate(line):
            result[i][j] = value * sum(b[i][k] * a[k][j] for k in range(len(a)))
    return result


def inverse(matrix: Matrix) -> Matrix:
    """By Gauss and Jordan; the pivots of I - Q are never small."""
    size = len(matrix)
    rows = [[*line, *(1.0 if i == j else 0.0 for j in range(size))] for i, line in enumerate(matrix)]
    for k, pivot in enumerate(rows):
        rows[k] = pivot = [value / pivot[k] for value in pivot]
        for i, line in enumerate(rows):
            if i != k:
                rows[i] = [value - line[k] * own for value, own in zip(line, pivot, strict=True)]
    return [line[size:] for line in rows]


def oft(weight: Matrix, triangles: Matrix, block: int, terms: int | None) -> Matrix:
    """W0 (R^T - I), block by block; R is the inverse's, or I + 2 Q + ... + 2 Q^(terms - 2) + Q^(terms - 1)."""
    result = [[-value for value in line] for line in weight]
    for number, triangle in enumerate(triangles):
        plus, minus = ([[float(i == j) for j in range(block)] for i in range(block)] for _ in range(2))
        pairs = [(i, j) for i in range(block) for j in range(i + 1, block)]
        skew = zeros(block, block)
        for (i, j), value in zip(pairs, triangle, strict=True):
            skew[i][j], skew[j][i] = value, -value
            plus[i][j], plus[j][i] = value, -value
            minus[i][j], minus[j][i] = -value, value
        if terms is None:
            turn = product(plus, inverse(minus))
        else:
            turn, power = [list(line) for line in plus], skew
            for i, j in pairs:
                turn[i][j], turn[j][i] = 2 * skew[i][j], 2 * skew[j][i]
            for term in range(2, terms):
                power = product(power, skew)
                for i in range(block):
                    for j in range(block):
                        turn[i][j] += (1 if term == terms - 1 else 2) * power[i][j]
        start = number * block
        for line, own in zip(weight, result, strict=True):
            for j in range(block):
                own[start + j] += sum(line[start + k] * turn[j][k] for k in range(block))
    return result


def _list(tensor: Tensor) -> Any:
    return tensor.detach().double().tolist()


def orthogonal_entry(size: int, i: int, j: int) -> float:
    """Walsh-Hadamard by the power of two in a size, cos + sin by the odd rest of it."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    sign = (-1) ** bin((i // odd) & (j // odd)).count("1")
    angle = 2 * math.pi * (i % odd) * (j % odd) / odd
    return sign * (math.cos(angle) + math.sin(angle))


def hadamard(signs: list[list[int]], large: int, small: int, columns: int) -> Matrix:
    """The structured B (D, n r), entry by entry: s[k d + q b + i'] H[i, i'] O[q, q'] t[p]."""
    block = next((size for size in range(64, small) if small % size == 0), small)
    result = zeros(large, columns)
    for row in range(large):
        for p in range(columns):
            within, column = row % small, p % small
            sign = signs[row - row % block + column % block][0] * signs[column][1]
            inside = orthogonal_entry(block, within % block, column % block)
            across = orthogonal_entry(small // block, within // block, column // block)
            result[row][p] = sign * inside * across
    return result


def bases_b(delta: Any, large: int, small: int) -> list[Matrix]:
    """The matrices B_j (D, r) of one layer."""
    count, rank = delta.lambdas.shape
    if not delta.structured:
        return [_list(delta.bases.B[:large, j, :rank].double() * delta.bases.scale) for j in range(count)]
    b = hadamard(delta.bases.B[..., 0].tolist(), large, small, count * rank)
    return [[line[j * rank : (j + 1) * rank] for line in b] for j in range(count)]


def shares(v: Tensor) -> list[float]:
    """The softmax of AutoLoRA's selection variables."""
    powers = [math.exp(value) for value in _list(v)]
    return [power / sum(powers) for power in powers]


def _randlora(delta: Any, out_features: int, in_features: int) -> Matrix:
    large, small = max(out_features, in_features), min(out_features, in_features)
    count, rank = delta.lambdas.shape
    b = bases_b(delta, large, small)
    if isinstance(delta, SelectedBases):
        b = [
            [[share * value for value in line] for line in basis]
            for share, basis in zip(shares(delta.v), b, strict=True)
        ]
    if isinstance(delta, SummedRandLoRADelta):
        a = [_list(delta.bases.A[j, :rank, :small]) for j in range(count)]
        result = randlora_a(a, b, _list(delta.lambdas), _list(delta.gammas), delta.scaling)
    else:
        form = randlora_peft if delta.pairing == "peft" else randlora
        a, lam, gam = _list(delta.bases.A[0, :rank, :small]), _list(delta.lambdas), _list(delta.gammas)
        leads = transpose(_list(delta.lead)) if isinstance(delta, LedRandLoRADelta) else []
        others = [[0.0, *line[1:]] if j < len(leads) else line for j, line in enumerate(lam)]
        result = form(a, b, others, gam, delta.scaling)
        for j, column in enumerate(leads):
            add_outer(result, delta.scaling * lam[j][0], column, gam[j])
    return transpose(result) if out_features < in_features else result


def _update(delta: DeltaWeight, weight: Tensor) -> Matrix:
    """The update of one weight, or of each block of it."""
    out_features, in_features = weight.shape
    if isinstance(delta, RandLoRADelta | SummedRandLoRADelta):
        return _randlora(delta, out_features, in_features)
    if isinstance(delta, SelectedRanks):
        b = [[value * share for value, share in zip(line, shares(delta.v), strict=True)] for line in _list(delta.B)]
        return lora(_list(delta.A), b, delta.scaling)
    if isinstance(delta, LoRADelta):
        return lora(_list(delta.A), _list(delta.B), delta.scaling)
    if isinstance(delta, PiSSADelta):
        return pissa(*map(_list, (delta.A, delta.B, delta.A0, delta.B0)), delta.scaling)
    if isinstance(delta, MinorDelta):
        return lora(_list(delta.A), _list(delta.U), delta.scaling)
    if isinstance(delta, LoRAXSDelta):
        return product(lora(_list(delta.R), _list(delta.U), delta.scaling), _list(delta.V))
    if isinstance(delta, AdaLoRADelta):
        return adalora(_list(delta.A), _list(delta.E), _list(delta.B), delta.scaling)
    if isinstance(delta, VeRADelta):
        b = _list(delta.bases.B[:out_features, 0, : delta.rank])
        return vera(
            _list(delta.bases.A[0, : delta.rank, :in_features]), b, _list(delta.b), _list(delta.d), delta.scaling
        )
    if isinstance(delta, NoLADelta):
        count = len(delta.alphas)
        b = [_list(delta.bases.B[:out_features, i, : delta.rank]) for i in range(count)]
        a = [_list(delta.bases.A[i, : delta.rank, :in_features]) for i in range(count)]
        return nola(a, b, _list(delta.alphas), _list(delta.betas), delta.scaling)
    if isinstance(delta, SVFTDelta):
        return svft(_list(delta.U), _list(delta.V), delta.places.tolist(), _list(delta.values))
    if isinstance(delta, PRANCDelta):
        form = "dense" if delta.bases is None else "shared"
        matrices = pranc_matrices(delta.seed, form, len(delta.alphas), out_features, in_features)
        return pranc(matrices, _list(delta.alphas), delta.alpha_scale)
    if isinstance(delta, OFTDelta):
        return oft(_list(weight), _list(delta.Q), delta.block, delta.neumann_terms)
    if isinstance(delta, HiRADelta):
        return hira(_list(weight), _list(delta.A), _list(delta.B))
    if isinstance(delta, KRAdapterDelta):
        return kradapter(_list(delta.U), _list(delta.V), delta.alpha, out_features, in_features)
    if isinstance(delta, TogetherDelta):
        return together([_update(part, weight) for part in delta.parts])  # type: ignore[arg-type]
    if isinstance(delta, SHiRADelta):
        return shira(delta.places.tolist(), _list(delta.values), out_features, in_features)
    raise AssertionError(f"no reference for {type(delta).__name__}")


def adapted_weight(delta: DeltaWeight, weight: Tensor) -> Tensor:
    """The weight that a layer must act with, float64 (out, in), from the frozen one and its update."""
    if isinstance(delta, RowBlocks):
        result = weight.detach().double().clone()
        for name, block in delta.blocks().items():
            rows = slice(*delta.rows[name])
            result[rows] = adapted_weight(block, weight[rows])
        return result
    if isinstance(delta, DoRADelta):
        return torch.tensor(
            dora(_list(weight), _update(delta.inner, weight), _list(delta.magnitude)), dtype=torch.float64
        )
    return weight.detach().double() + torch.tensor(_update(delta, weight), dtype=torch.float64)


def adapted_outputs(delta: DeltaWeight, x: Tensor, weight: Tensor) -> Tensor:
    """Outputs (tokens, out) in float64 of a layer whose update depends on its input x (tokens, in)."""
    result = x.double() @ weight.detach().double().T
    blocks = delta.blocks() if isinstance(delta, RowBlocks) else {"": delta}
    for name, block in blocks.items():
        assert isinstance(block, HydraLoRADelta)
        rows = slice(*delta.rows[name]) if isinstance(delta, RowBlocks) else slice(None)
        tensors = [_list(tensor) for tensor in (block.A, block.B, block.router)]
        result[:, rows] += torch.tensor([hydralora(_list(token), *tensors, block.scaling) for token in x]).double()
    return result


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10 in Python's own integers, from the description in Salmon et al. (SC 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & 0xFFFFFFFF, (first >> 32) ^ c3 ^ k1, first & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def basis_word(seed: int, tensor: str, j: int, row: int, column: int) -> int:
    """The 32-bit word behind one entry of a basis."""
    stream = int.from_bytes(hashlib.sha256(tensor.encode()).digest()[:4], "little")
    return philox((seed & 0xFFFFFFFF, seed >> 32), (column // 4, row, j, stream))[column % 4]


def _polynomial(x: float, coefficients: tuple[float, ...]) -> float:
    result = coefficients[0]
    for coefficient in coefficients[1:]:
        result = result * x
        result = result + coefficient
    return result


def normal_quantile(word: int) -> float:
    """The normal quantile of (word + 1/2) / 2**32 in Python's own IEEE numbers: no kernels, no vector units."""
    p = (word + 0.5) / 2**32
    q = p - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        return _polynomial(r, bases._CENTRE[0]) / _polynomial(r, bases._CENTRE[1]) * q
    mantissa, exponent = math.frexp(min(p, 1 - p))
    z = (mantissa - 1) / (mantissa + 1)
    log = _polynomial(z * z, tuple(2.0 / power for power in range(37, 0, -2))) * z + exponent * math.log(2)
    root = 1 + -log * 0.25
    for _ in range(6):
        root = (root + -log / root) * 0.5
    numerator, denominator = bases._SHOULDER if root <= 5.0 else bases._TAIL
    x = root - (1.6 if root <= 5.0 else 5.0)
    return math.copysign(_polynomial(x, numerator) / _polynomial(x, denominator), q)
