"""Where an update meets a frozen weight: adapted layers that keep every key of the layer they replace.

A layer is adapted in place: its class changes to a subclass of its own and a ``delta`` child appears
beside its tensors, so that state-dict keys, hooks, references and shared modules all stay as they were.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.adapters.base import DeltaWeight


def unsharded(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 may have sharded, as a plain one; then all processes must ask for it at once."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A plain tensor that all processes have, sharded as another one, if that is; nothing is exchanged."""
    if not hasattr(other, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    replicated = DTensor.from_local(tensor, other.device_mesh, [Replicate()], run_check=False)  # type: ignore[attr-defined]
    return replicated.redistribute(placements=other.placements)  # type: ignore[attr-defined]


class AdaptedLayer(nn.Module):
    """What adapted layers share: one frozen weight, its update, and merging that can be undone bit for bit."""

    weight_name: ClassVar[str]
    transposed: ClassVar[bool] = False  # whether the weight is stored as (in, out)
    mergeable: ClassVar[bool] = True
    delta: DeltaWeight | None
    frozen_weight: Tensor | None  # W0 while merged, kept because a subtraction would not give it back exactly
    plain_class: type[nn.Module]
    enabled: bool

    @classmethod
    def attach(cls, layer: nn.Module, delta: DeltaWeight | None) -> None:
        """Turns a plain layer into an adapted one; without an update it only routes through its children."""
        plain_class = type(layer)
        layer.__class__ = cls
        assert isinstance(layer, AdaptedLayer)
        layer.plain_class, layer.enabled, layer.delta = plain_class, True, delta
        layer.register_buffer("frozen_weight", None, persistent=False)

    def detach(self) -> None:
        """Turns the layer back into a plain one, with whatever weight it has now."""
        del self.delta, self.frozen_weight, self.enabled
        plain_class = self.plain_class
        del self.plain_class
        self.__class__ = plain_class  # type: ignore[assignment]

    @property
    def adapted_weight(self) -> nn.Parameter:
        """The parameter that the update belongs to: W0, or the merged weight while merged."""
        weight = self._parameters[self.weight_name]
        assert weight is not None
        return weight

    @property
    def base_weight(self) -> Tensor:
        """W0, (out, in), also while merged."""
        return self.swap_layout(self.adapted_weight if self.frozen_weight is None else self.frozen_weight)

    def swap_layout(self, matrix: Tensor) -> Tensor:
        """From (out, in) to what the weight is stored as, and back: the transpose, another shape, or nothing."""
        return matrix.T if self.transposed else matrix

    @property
    def merged(self) -> bool:
        """Whether the layer's weight holds the update now."""
        return self.frozen_weight is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Writes the effective weight; does nothing when it is written already."""
        if self.delta is not None and not self.merged:
            weight = self.adapted_weight
            merged = self.swap_layout(self.delta.effective_weight(self.swap_layout(unsharded(weight))))
            self.frozen_weight = weight.detach().clone()
            weight.copy_(sharded_like(merged, weight))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts W0 back, bit for bit."""
        if self.frozen_weight is not None:
            self.adapted_weight.copy_(self.frozen_weight)
            self.frozen_weight = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()  # a weight that is loaded is a W0, and updates that are loaded are in no weight yet
        super()._load_from_state_dict(*args, **kwargs)

    def adapted_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's linear map, with the update unless it is disabled or merged."""
        weight = (
            self.swap_layout(self.adapted_weight) if self.enabled else unsharded(self.base_weight)
        )  # W0 of a merged layer stays sharded
        if self.delta is None or not self.enabled or self.merged:
            return F.linear(x, weight, bias)
        return self.delta.linear(x, weight, bias)


class AdaptedLinear(AdaptedLayer, nn.Linear):
    """``nn.Linear`` with an update of its weight."""

    weight_name = "weight"

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return self.adapted_linear(input, self.bias)


class AdaptedConv1D(AdaptedLayer):
    """transformers' ``Conv1D`` with an update of its weight, which is stored as (in, out)."""

    weight_name = "weight"
    transposed = True
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return self.adapted_linear(x, self.bias)


class AdaptedAttention(AdaptedLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with an update of its packed q/k/v weight, which autograd sees.

    The output projection is called as a module, so that an adapted one takes part. Every option of the
    plain layer works; the common case goes straight to scaled dot product attention.
    """

    weight_name = "in_proj_weight"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments, shapes and results are those of ``nn.MultiheadAttention.forward``."""
        q, k, v = self._project(query, key, value)
        plain = self.bias_k is None and not self.add_zero_attn and key_padding_mask is None
        wrong = k.shape != v.shape or (is_causal and attn_mask is None)  # PyTorch's own function explains these
        if plain and not wrong and not need_weights and q.dim() == 3:
            return self.out_proj(self._attend(q, k, v, attn_mask)), None
        # The rare options: PyTorch's own function, behind projections that are already done.
        swap = self.batch_first and q.dim() == 3
        if swap:
            q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
        identity = torch.eye(self.embed_dim, dtype=q.dtype, device=q.device)
        attended, weights = F.multi_head_attention_forward(
            q, k, v, self.embed_dim, self.num_heads, None, None, self.bias_k, self.bias_v, self.add_zero_attn,
            self.dropout, identity, None, training=self.training, key_padding_mask=key_padding_mask,
            need_weights=need_weights, attn_mask=attn_mask, use_separate_proj_weight=True, q_proj_weight=identity,
            k_proj_weight=identity, v_proj_weight=identity, average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )  # fmt: skip
        return self.out_proj(attended.transpose(0, 1) if swap else attended), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of equal shape to their inputs; one product where all three inputs are one tensor."""
        packed = self.adapted_linear(query, self.in_proj_bias)
        if query is key and key is value:
            q, k, v = packed.chunk(3, dim=-1)
            return q, k, v
        q = packed.chunk(3, dim=-1)[0]
        packed = self.adapted_linear(key, self.in_proj_bias)
        k = packed.chunk(3, dim=-1)[1]
        if key is not value:
            packed = self.adapted_linear(value, self.in_proj_bias)
        return q, k, packed.chunk(3, dim=-1)[2]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Scaled dot product attention over the heads; a mask is (L, S) or (N * heads, L, S)."""
        if not self.batch_first:
            q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
        batch, length, _ = q.shape
        q, k, v = (t.view(*t.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for t in (q, k, v))
        if mask is not None:
            # True means "hidden" here and "visible" there.
            mask = ~mask if mask.dtype == torch.bool else mask.to(q.dtype)
            mask = mask.reshape(batch, self.num_heads, *mask.shape[1:]) if mask.dim() == 3 else mask
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        attended = attended.transpose(1, 2).reshape(batch, length, self.embed_dim)
        return attended if self.batch_first else attended.transpose(0, 1)


class RowBlocks(DeltaWeight):
    """Updates of some row blocks of a packed weight (q, k or v), the other rows staying as they are.

    Args:
        blocks: The update of each block by name, in any order.
        rows: First and last row + 1 of every block of the weight, in order, with or without an update.
    """

    def __init__(self, blocks: dict[str, DeltaWeight], rows: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.rows = rows
        for name, delta in blocks.items():
            self.add_module(name, delta)

    def blocks(self) -> dict[str, DeltaWeight]:
        """The updates by name."""
        return {name: delta for name, delta in self.named_children() if isinstance(delta, DeltaWeight)}

    def _each(self, make: Callable[[DeltaWeight | None, slice], Tensor], dim: int) -> Tensor:
        blocks = self.blocks()
        return torch.cat([make(blocks.get(name), slice(*rows)) for name, rows in self.rows.items()], dim)

    def delta(self) -> Tensor:
        """The blocks' updates with zeros between them, (out, in)."""
        return self._with_zeros({name: block.delta() for name, block in self.blocks().items()})

    def change(self, weight: Tensor) -> Tensor:
        """The blocks' changes with zeros between them, (out, in)."""
        rows = {name: slice(*place) for name, place in self.rows.items()}
        return self._with_zeros({name: block.change(weight[rows[name]]) for name, block in self.blocks().items()})

    def _with_zeros(self, parts: dict[str, Tensor], dim: int = 0) -> Tensor:
        some = next(iter(parts.values())).movedim(dim, 0)
        return torch.cat(
            [
                parts[name] if name in parts else some.new_zeros(stop - start, *some.shape[1:]).movedim(0, dim)
                for name, (start, stop) in self.rows.items()
            ],
            dim,
        )

    def effective_weight(self, weight: Tensor) -> Tensor:
        """Each block's effective weight, in place."""
        return self._each(lambda block, rows: block.effective_weight(weight[rows]) if block else weight[rows], 0)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Each block's own fast path, side by side."""

        def one(block: DeltaWeight | None, rows: slice) -> Tensor:
            part = None if bias is None else bias[rows]
            return F.linear(x, weight[rows], part) if block is None else block.linear(x, weight[rows], part)

        return self._each(one, -1)

    def contribution(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """Each block's own, with zeros between them, (..., out)."""
        rows = {name: slice(*place) for name, place in self.rows.items()}
        parts = {
            name: block.contribution(x, lambda own=rows[name]: weight()[own])  # type: ignore[misc]
            for name, block in self.blocks().items()
        }
        return self._with_zeros(parts, -1)
