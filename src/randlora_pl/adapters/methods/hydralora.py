"""HydraLoRA: one A, several heads B, and a router that weights the heads for each token (Tian et al., 2024)."""

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import Adapter, DeltaWeight, Procedure, Rank, like, plus_product
from randlora_pl.adapters.random_bases import Bases, WeightShape, kaiming, trainable
from randlora_pl.utils.options import Count, NotNegative


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

    learning_rates = (2e-4, 2e-4, 2e-4)  # its code, for language models
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
