"""LoRA, a trained low-rank update (Hu et al., 2022), and HydraLoRA.

LoRA is the baseline of every table of the paper. HydraLoRA has one A, several heads B, and a router that weights the
heads for each token (Tian et al., 2024).
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from statistics import mode
from typing import Annotated, Any, Literal

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
    Procedure,
    Rank,
    like,
    peft_number,
    plus_product,
)
from randlora_pl.adapters.random_bases import (
    Bases,
    WeightShape,
    by_pattern,
    draw_parameter,
    exact_pattern,
    kaiming,
    per_layer,
    trainable,
)
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Count, NotNegative, Positive

PEFT_FORM = PeftForm(
    "LORA",
    frozenset(
        {
            *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
            *("init_lora_weights", "target_parameters"),
        }
    ),
    ("lora_A.weight", "lora_B.weight"),
    kernels=("lora_A.weight", "lora_B.weight"),
    convolutions=True,
    packed=True,
)


class LoRA(Adapter):
    """LoRA: delta = scaling * B A with trained B (out, r) and A (r, in).

    Examples:
        >>> inject(model, LoRA(rank=4, alpha=8)).trainable
        18432
    """

    rank: Rank = 32
    """Rank r. A number, or numbers by pattern of layer names."""
    alpha: float | dict[str, float] = 1.0
    """The update is scaled by alpha / r (Table 8: 1 / r). A number, or numbers by pattern, as ``rank``."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead (rsLoRA, Kalajdzievski, 2023)."""
    init: Literal["kaiming", "official"] = "kaiming"
    """``kaiming`` starts with B at zero and A uniform up to 1 / sqrt(in). ``official`` is the start in the code of the
    RandLoRA paper: A at zero and B uniform up to 1 / sqrt(r out); for packed attention B at zero and A up to 1 / sqrt(r
    in)."""
    rate_ratio: Annotated[float, Positive] = 1.0
    """Learning rate of B divided by the one of A (LoRA+, Hayou et al., 2024), which is ``--model.learning_rate``."""

    neutral = ("rate_ratio",)  # affects training only
    learning_rates = (1e-3, 1e-2, 1e-4)  # Table 8; section C.3; the released scripts
    proportional_to = ("B",)
    trains_factors = True
    inside = True  # the method inside another one, if a config has none
    starts_stage = True  # a training may start from it, see `refine`
    untrained = "texts"  # the method of language models that are only tested: their weights may be in half precision
    peft = PEFT_FORM

    def scaling_of(self, shape: WeightShape) -> float:
        """Return alpha / r, or alpha / sqrt(r), for one layer."""
        rank = self.rank_of(shape)
        return float(self.value("alpha", shape)) / (math.sqrt(rank) if self.rslora else rank)

    def count(self, shape: WeightShape) -> int:
        """Return r (out + in)."""
        return self.rank_of(shape) * (shape.out_features + shape.in_features)

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> "LoRADelta":
        """Create the update of one weight, with A (r, in) and B (out, r)."""
        delta = LoRADelta(self, shape, weight)
        delta.rates = rates_of_factors(self.rate_ratio)
        return delta

    def to_peft(self, parts: list[Part], bases: Bases | None) -> PeftFile:
        """Convert A and B: packed attention becomes ``target_parameters``, blocks become one larger rank."""
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        modules: list[str] = []
        parameters: list[str] = []
        for path, a, b, alpha, packed in _factors(self, parts):
            tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = a, b
            name = f"{path}.in_proj_weight" if packed else path  # PEFT matches its patterns with this name
            ranks[name], alphas[name] = len(a), alpha
            (parameters if packed else modules).append(name)
        if parameters and self.dropout:
            raise UserError("PEFT has no dropout for weights of nn.MultiheadAttention; set dropout to 0")
        rank, alpha = mode(ranks.values()), mode(alphas.values())
        config = {
            "r": rank,
            "lora_alpha": peft_number(alpha),
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "use_dora": False,
            "rank_pattern": by_pattern({name: own for name, own in ranks.items() if own != rank}),
            "alpha_pattern": by_pattern({name: peft_number(own) for name, own in alphas.items() if own != alpha}),
            "target_modules": exact_pattern(modules) if modules else [],
            "target_parameters": parameters or None,
            "init_lora_weights": True,
            "exclude_modules": None,
        }
        return config, tensors

    @classmethod
    def from_peft(cls, content: PeftContent) -> tuple["LoRA", Layers, None]:
        """Convert PEFT's LoRA; ranks come from the tensors, alphas from PEFT's patterns."""
        config = content.config
        ours: Layers = {}
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for layer, own in content.layers.items():
            ours[layer] = {"A": own["lora_A"].flatten(1), "B": own["lora_B"].flatten(1)}  # also for convolutions
            name = content.names[layer]
            ranks[layer] = _pattern(config, "rank_pattern", name, config["r"])
            alphas[layer] = _pattern(config, "alpha_pattern", name, content.number("lora_alpha", 8.0))
            if (rows := len(own["lora_A"])) != ranks[layer]:
                raise UserError(
                    f"{content.source}: lora_A of {layer} has {rows} rows, r is {ranks[layer]} in its config."
                )
        rslora, dropout = bool(config.get("use_rslora")), content.number("lora_dropout", 0.0)
        return LoRA(rank=per_layer(ranks), alpha=per_layer(alphas), rslora=rslora, dropout=dropout), ours, None


class LoRADelta(FactoredDelta):
    """scaling * B A of one weight; one of the two starts at zero (``init``)."""

    trains_factors = True

    def __init__(self, adapter: LoRA, shape: WeightShape, weight: Tensor) -> None:
        super().__init__(adapter.dropout)
        rank, self.scaling = adapter.rank_of(shape), adapter.scaling_of(shape)
        key, name, out, columns = adapter.key, f"lora/{shape.layer}", shape.out_features, shape.in_features
        official = adapter.init == "official"
        if official and not (shape.layer.rpartition(".")[2] == "in_proj" and out == 3 * columns):
            self.A = trainable(weight, rank, columns, fill=0.0)
            self.B = draw_parameter(weight, key, name, out, rank, "uniform", 1 / math.sqrt(3 * rank * out))
        else:
            fan = rank * columns if official else columns
            self.A = draw_parameter(weight, key, name, rank, columns, "uniform", 1 / math.sqrt(3 * fan))
            self.B = trainable(weight, out, rank, fill=0.0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return scaled B, (out, r), and A, (r, in)."""
        return self.B * self.scaling, self.A


def rates_of_factors(ratio: float) -> dict[str, float]:
    """Return the factors of the learning rate (`DeltaWeight.rates`) of A and B: ``ratio`` for B (LoRA+)."""
    return {} if ratio == 1 else {"B": ratio}


def with_ranks(ranks: Mapping[str, int], scalings: Mapping[str, float], **options: Any) -> LoRA:
    """Return a LoRA with ranks and scalings by layer, by default 1, and further options."""
    alphas = {layer: scalings.get(layer, 1.0) * rank for layer, rank in ranks.items()}
    return LoRA(rank=per_layer(ranks), alpha=per_layer(alphas), **options)


def of_factors(parts: list[Part], method: Adapter) -> LoRA:
    """Return the LoRA with a scaling of 1 whose A and B are these factors of a method's updates."""
    ranks = {part.shape.layer: len(part.tensors["A"]) for part in parts}
    return with_ranks(ranks, {}, dropout=method.dropout, qkv=method.qkv, seed=method.seed)


def _factors(lora: LoRA, parts: list[Part]) -> Iterator[tuple[str, Tensor, Tensor, float, bool]]:
    """Yield path, A, B, alpha and True for packed attention, for each whole weight.

    The blocks q, k and v of one weight become one LoRA with the sum of their ranks: their A are stacked, their B are on
    the diagonal.
    """
    by_path: dict[str, list[Part]] = {}
    for part in parts:
        by_path.setdefault(part.path, []).append(part)
    for path, (first, *others) in by_path.items():
        a, b = first.tensors["A"], first.tensors["B"]
        if first.block is None:
            yield path, a, b, float(lora.value("alpha", first.shape)), first.packed
            continue
        a = torch.cat([a, *(part.tensors["A"] for part in others)])
        sizes = {str(part.block): part.shape.out_features for part in by_path[path]}
        if len(sizes) < 3:
            width = first.shape.in_features
            if any(size != width for size in sizes.values()):  # grouped-query attention
                raise UserError(
                    f"{path} is adapted in {' and '.join(sizes)} alone, and the rows are unknown without its model"
                )
            sizes = dict.fromkeys("qkv", width)
        tops = {"q": 0, "k": sizes["q"], "v": sizes["q"] + sizes["k"]}
        column, scaling = 0, lora.scaling_of(first.shape) or 1.0
        b = a.new_zeros(tops["v"] + sizes["v"], len(a))
        for part in (first, *others):
            own = part.tensors["B"] * (lora.scaling_of(part.shape) / scaling)
            top = tops[str(part.block)]
            b[top : top + len(own), column : column + own.shape[1]] = own
            column += own.shape[1]
        yield path, a, b, scaling * (math.sqrt(len(a)) if lora.rslora else len(a)), first.packed


def _pattern(config: Mapping[str, Any], key: str, name: str, default: Any) -> Any:
    """Return the value of PEFT's first pattern that matches the end of a layer's name."""
    patterns = config.get(key) or {}
    return next((value for p, value in patterns.items() if re.match(rf"(?:.*\.)?(?:{p})$", name)), default)


class HydraLoRA(Adapter):
    """HydraLoRA: delta(x) = scaling * sum_k w_k(x) B_k A, with the softmax of a router as weights of each token.

    Section 3 of arXiv 2404.19245. The update depends on the input, so it cannot be merged into the weight.

    Examples:
        >>> inject(model, HydraLoRA(rank=4, heads=2)).trainable
        33024
    """

    rank: Rank = 8
    """Rank r. A number, or numbers by pattern of layer names."""
    heads: Count = 3
    """Number K of matrices B."""
    alpha: float | dict[str, float] = 32.0
    """The update is scaled by alpha / r. A number, or numbers by pattern, as ``rank``."""
    balance: Annotated[float, NotNegative] = 0.0
    """Coefficient of a term of the loss for an even use of the heads: the squared coefficient of variation of a layer's
    mean gates, averaged over layers. The released code has none, as 0."""
    rate_ratio: Annotated[float, Positive] = 1.0
    """Learning rate of the matrices B divided by A's and the router's (LoRA+, Hayou et al., 2024), which is
    ``--model.learning_rate``."""

    neutral = ("rate_ratio",)
    learning_rates = (2e-4, 2e-4, 2e-4)  # its code, for language models
    proportional_to = ("B",)
    fixed = False

    def count(self, shape: WeightShape) -> int:
        """Return r in + K r out + K in, with the router, which the paper's percentages leave out."""
        rank = self.rank_of(shape)
        return rank * shape.in_features + self.heads * (rank * shape.out_features + shape.in_features)

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> "HydraLoRADelta":
        """Create the update of one weight, with A (r, in), B (K, out, r) and router (K, in)."""
        return HydraLoRADelta(self, shape, weight)

    def procedure(self, model: nn.Module) -> "_Balance | None":
        """Return the term for an even use of the heads, or None."""
        updates = [module for module in model.modules() if isinstance(module, HydraLoRADelta)]
        return _Balance(self.balance, updates) if self.balance else None


class HydraLoRADelta(DeltaWeight):
    """scaling * sum_k w_k(x) B_k A x of one weight; A and the router start Kaiming-uniform, B at zero."""

    fixed = False
    mean_gates: Tensor | None = None  # (heads,) of the last use in training, for `_Balance`

    def __init__(self, adapter: HydraLoRA, shape: WeightShape, weight: Tensor) -> None:
        super().__init__(adapter.dropout)
        rank, columns = adapter.rank_of(shape), shape.in_features
        self.scaling = adapter.scaling_of(shape)
        self.balanced, self.heads = adapter.balance > 0, adapter.heads
        self.A = kaiming(weight, adapter.key, f"lora/{shape.layer}", rank, columns)  # as LoRA has it
        self.B = trainable(weight, adapter.heads, shape.out_features, rank, fill=0.0)
        self.rates = rates_of_factors(adapter.rate_ratio)
        self.router = kaiming(weight, adapter.key, f"router/{shape.layer}", adapter.heads, columns)

    def columns(self) -> Tensor:
        """Return the heads side by side, (out, K r), with the scaling."""
        return self.B.transpose(0, 1).flatten(1) * self.scaling

    def gates(self, logits: Tensor, dim: int = -1) -> Tensor:
        """Return the weights of the heads, float32 or float64, from the router's outputs with the heads in ``dim``."""
        gates = logits.softmax(dim, dtype=torch.promote_types(logits.dtype, torch.float32))
        if self.listener is not None:
            self.listener(gates.movedim(dim, -1))
        if self.balanced and self.training and torch.is_grad_enabled():
            self.mean_gates = gates.movedim(dim, -1).reshape(-1, gates.shape[dim]).mean(0)
        return gates

    def add(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Add the heads' product to the frozen layer's output."""
        return plus_product(nn.functional.linear(x, weight, bias), self._mixed(x), self.columns())

    def contribution(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """Return the weighted sum of the heads' outputs, (..., in) to (..., out)."""
        mixed = self._mixed(x)
        return nn.functional.linear(mixed, like(self.columns(), mixed))

    def _mixed(self, x: Tensor) -> Tensor:
        """Return w_k(x) A drop(x) of all heads side by side, (..., K r): one dropout and one product with A."""
        hidden = nn.functional.linear(self.dropped(x), like(self.A, x))
        gates = self.gates(nn.functional.linear(x, like(self.router, x)))
        return (gates[..., None] * hidden[..., None, :]).flatten(-2).to(hidden.dtype)

    def apart(self, x: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor], groups: int) -> Tensor:
        """Return the update's part of a convolution's outputs; each position and group of channels has its gates."""
        pairs = ((self.dropped(x), self.A), (x, self.router))
        products = [product(inputs, matrix.repeat(groups, 1)) for inputs, matrix in pairs]
        hidden, logits = (torch.stack(each.chunk(groups, -3), -4) for each in products)  # (..., groups, r or K, h, w)
        gates = self.gates(logits, -3)
        mixed = (gates.unsqueeze(-3) * hidden.unsqueeze(-4)).flatten(-4, -3).to(hidden.dtype)
        heads = torch.stack(like(self.columns(), mixed).chunk(groups))
        return torch.einsum("gok,...gkhw->...gohw", heads, mixed).flatten(-4, -3)


class _Balance(Procedure):
    """Term of the loss for an even use of the heads; it sees the last micro-batch of an optimizer step."""

    def __init__(self, coefficient: float, updates: list[HydraLoRADelta]) -> None:
        self.coefficient, self.updates = coefficient, updates

    def penalty(self) -> Tensor | None:
        """Return coefficient * mean over layers of var(g) / mean(g)^2, with the mean gates g, which sum to one."""
        means = [update.mean_gates for update in self.updates if update.mean_gates is not None]
        for update in self.updates:
            update.mean_gates = None
        if not means:
            return None
        gates = torch.stack(means)
        return self.coefficient * (gates.shape[1] * gates.square().sum(1) - 1).mean()

    def after_step(self, step: int, total: int) -> None:
        """Drop gates that a backward pass has computed again, because tensors with a history cannot be copied."""
        super().after_step(step, total)
        for update in self.updates:
            update.mean_gates = None
