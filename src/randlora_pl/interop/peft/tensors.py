"""Methods in PEFT's form: keys of its config, and tensors by the base model's names.

Scalings that PEFT's config cannot represent are multiplied into lambda, b or B.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from randlora_pl.adapters import AdapterFile, DoRA, LoRA, RandLoRA, VeRA
from randlora_pl.adapters.weights import WeightShape, exact_pattern, sides
from randlora_pl.interop.peft.bases import arrange, peft_count
from randlora_pl.utils.errors import UserError

T = TypeVar("T", int, float)
Form = tuple[dict[str, Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Part:
    """Adapted weight of a file, with its trained tensors by the update's own names, float32.

    ``path`` is the module that owns the weight, ``block`` the block of a packed weight (q, k or v), if any, and
    ``packed`` is True for the packed weight of ``nn.MultiheadAttention``.
    """

    shape: WeightShape
    path: str
    block: str | None
    packed: bool
    tensors: dict[str, Tensor]


def randlora_form(file: AdapterFile, adapter: RandLoRA, parts: list[Part]) -> Form:
    """Convert RandLoRA: PEFT has one alpha, so lambda takes the ratio; extra bases are zero.

    Raises:
        UserError: PEFT cannot represent the bases.
    """
    shapes = [part.shape for part in parts]
    bases = file.bases or adapter.bases(shapes, torch.device("cpu"))
    a, b = arrange(adapter, shapes, bases)
    rank = adapter.rank_of(shapes[0])
    alphas = [float(adapter.of(adapter.alpha, shape, 10.0)) for shape in shapes]
    alpha = _common_value([value for value in alphas if value] or [1.0])
    tensors = {"randlora_A": a, "randlora_B": b}
    for part, own in zip(parts, alphas, strict=True):
        count = peft_count(part.shape.small, rank)
        lambdas, gammas = (_filled(part.tensors[name], count) for name in ("lambdas", "gammas"))
        tensors[f"{part.path}.randlora_lambda"] = lambdas.T * (own / alpha)
        tensors[f"{part.path}.randlora_gamma"] = gammas
    config = _with_bases("RANDLORA", rank, adapter, parts)
    return config | {"randlora_alpha": _number(alpha), "sparse": False, "very_sparse": False}, tensors


def _with_bases(method: str, rank: int, adapter: RandLoRA | VeRA, parts: list[Part]) -> dict[str, Any]:
    """Return the keys that methods with random bases share."""
    return {
        "peft_type": method,
        "r": rank,
        "target_modules": exact_pattern(part.path for part in parts),
        f"{method.lower()}_dropout": adapter.dropout,
        "projection_prng_key": adapter.key,
        "save_projection": True,
        "init_weights": True,
    }


def _filled(tensor: Tensor, rows: int) -> Tensor:
    """Append rows of zeros, for what only PEFT has."""
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def vera_form(file: AdapterFile, adapter: VeRA, parts: list[Part]) -> Form:
    """Convert VeRA: PEFT has one rank, lowered per layer by zeros in d, and no scaling, which b takes."""
    shapes = [part.shape for part in parts]
    rank, (rows, columns) = max(adapter.rank_of(shape) for shape in shapes), sides(shapes)
    bases = file.bases or adapter.bases(shapes, torch.device("cpu"))
    tensors = {"vera_A": bases.A[0, :rank, :columns], "vera_B": bases.B[:rows, 0, :rank]}
    for part in parts:
        scaling = float(adapter.of(adapter.alpha, part.shape, 1.0)) / adapter.rank_of(part.shape)
        tensors[f"{part.path}.vera_lambda_b"] = part.tensors["b"] * scaling
        tensors[f"{part.path}.vera_lambda_d"] = _filled(part.tensors["d"], rank)
    return _with_bases("VERA", rank, adapter, parts) | {"d_initial": adapter.d_initial}, tensors


def lora_form(adapter: LoRA | DoRA, parts: list[Part]) -> Form:
    """Convert LoRA, or DoRA around it: packed attention becomes ``target_parameters``, blocks become one larger rank.

    Raises:
        UserError: PEFT cannot represent the LoRA.
    """
    inner = adapter.inner if isinstance(adapter, DoRA) else adapter
    assert isinstance(inner, LoRA)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    modules: list[str] = []
    parameters: list[str] = []
    for path, a, b, alpha, packed in _factors(inner, parts):
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = a, b
        name = f"{path}.in_proj_weight" if packed else path  # PEFT matches its patterns with this name
        ranks[name], alphas[name] = len(a), alpha
        (parameters if packed else modules).append(name)
    if isinstance(adapter, DoRA):
        tensors |= {f"{part.path}.lora_magnitude_vector": part.tensors["magnitude"] for part in parts}
    if parameters and inner.dropout:
        raise UserError("PEFT has no dropout for weights of nn.MultiheadAttention; set dropout to 0")
    rank, alpha = _common_value(ranks.values()), _common_value(alphas.values())
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": inner.dropout,
        "use_rslora": inner.rslora,
        "use_dora": isinstance(adapter, DoRA),
        "rank_pattern": _patterns(ranks, rank),
        "alpha_pattern": {name: _number(value) for name, value in _patterns(alphas, alpha).items()},
        "target_modules": exact_pattern(modules) if modules else [],
        "target_parameters": parameters or None,
        "init_lora_weights": True,
        "exclude_modules": None,
    }
    return config, tensors


def _factors(inner: LoRA, parts: list[Part]) -> Iterator[tuple[str, Tensor, Tensor, float, bool]]:
    """Yield path, A, B, alpha and True for packed attention, for each whole weight.

    The blocks q, k and v of one weight become one LoRA with the sum of their ranks: their A are stacked, their B are on
    the diagonal.
    """
    by_path: dict[str, list[Part]] = {}
    for part in parts:
        by_path.setdefault(part.path, []).append(part)
    for path, (first, *others) in by_path.items():
        a, b = _of(first, "A"), _of(first, "B")
        if first.block is None:
            yield path, a, b, float(inner.of(inner.alpha, first.shape, 1.0)), first.packed
            continue
        a = torch.cat([a, *(_of(part, "A") for part in others)])
        rows, column, scaling = _rows(by_path[path]), 0, _scaling(inner, first.shape) or 1.0
        b = a.new_zeros(rows["v"].stop, len(a))
        for part in (first, *others):
            own = _of(part, "B") * (_scaling(inner, part.shape) / scaling)
            b[rows[str(part.block)], column : column + own.shape[1]] = own
            column += own.shape[1]
        yield path, a, b, scaling * (math.sqrt(len(a)) if inner.rslora else len(a)), first.packed


def _rows(parts: list[Part]) -> dict[str, slice]:
    """Return the rows of q, k and v in one fused weight, from its adapted blocks.

    Raises:
        UserError: A block is not adapted, and its number of rows is unknown.
    """
    sizes = {str(part.block): part.shape.out_features for part in parts}
    if len(sizes) < 3:
        width = parts[0].shape.in_features
        if any(size != width for size in sizes.values()):  # grouped-query attention
            raise UserError(
                f"{parts[0].path} is adapted in {' and '.join(sizes)} alone, and the rows are unknown without its model"
            )
        sizes = dict.fromkeys("qkv", width)
    middle = sizes["q"] + sizes["k"]
    return {"q": slice(0, sizes["q"]), "k": slice(sizes["q"], middle), "v": slice(middle, middle + sizes["v"])}


def _of(part: Part, name: str) -> Tensor:
    """Return A or B of LoRA, also inside DoRA."""
    return part.tensors[name] if name in part.tensors else part.tensors[f"inner.{name}"]


def _scaling(inner: LoRA, shape: WeightShape) -> float:
    rank = inner.rank_of(shape)
    return float(inner.of(inner.alpha, shape, 1.0)) / (math.sqrt(rank) if inner.rslora else rank)


def _patterns(values: Mapping[str, T], common: T) -> dict[str, T]:
    """Return PEFT's patterns for the layers whose value differs from the common one."""
    layers: dict[T, list[str]] = {}
    for path, value in values.items():
        if value != common:
            layers.setdefault(value, []).append(path)
    return {f"^{exact_pattern(paths)}": value for value, paths in layers.items()}


def _common_value(values: Iterable[T]) -> T:
    return Counter(values).most_common(1)[0][0]


def _number(value: float) -> float:
    """Return a whole number as int, which PEFT's configs require."""
    return int(value) if value == int(value) else value
