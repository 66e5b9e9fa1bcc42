"""Adapted layers, which keep every state-dict key of the plain layers: a class for each kind of layer.

A layer is adapted in place: its class is replaced by a subclass and a ``delta`` child is added, so that state-dict
keys, hooks, references and shared modules stay valid.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.adapters.base import DeltaWeight, like, no_matrix
from randlora_pl.adapters.sites import dequantize, is_conv1d, is_quantized, reader_of
from randlora_pl.utils.device import on_cuda
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.packed import PackedLinear


def unsharded(tensor: Tensor) -> Tensor:
    """Return a plain tensor for one that FSDP2 may have sharded; a collective operation if it is sharded."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


class AdaptedLayer(nn.Module):
    """Base of adapted layers: one frozen weight, its update, and exactly reversible merging."""

    weight_name: ClassVar[str]
    transposed: ClassVar[bool] = False  # True if the weight is stored as (in, out)
    delta: DeltaWeight | None
    frozen_weight: Tensor | None  # W0 while merged, because subtraction would not restore it exactly
    plain_class: type[nn.Module]
    enabled: bool

    @classmethod
    def attach(cls, layer: nn.Module, delta: DeltaWeight | None) -> None:
        """Convert a plain layer to an adapted one; without an update it only calls its child modules."""
        plain_class = type(layer)
        layer.__class__ = cls
        assert isinstance(layer, AdaptedLayer)
        layer.plain_class, layer.enabled, layer.delta = plain_class, True, delta
        layer.register_buffer("frozen_weight", None, persistent=False)

    def detach(self) -> None:
        """Convert the layer back to a plain one with its current weight."""
        del self.delta, self.frozen_weight, self.enabled
        plain_class = self.plain_class
        del self.plain_class
        self.__class__ = plain_class  # type: ignore[assignment]

    @property
    def adapted_weight(self) -> nn.Parameter:
        """Parameter of the update: W0, or the merged weight while merged."""
        weight = self._parameters[self.weight_name]
        assert weight is not None
        return weight

    @property
    def base_weight(self) -> Tensor:
        """Frozen weight W0, (out, in), also while merged."""
        return self.swap_layout(self.adapted_weight if self.frozen_weight is None else self.frozen_weight)

    def swap_layout(self, matrix: Tensor) -> Tensor:
        """Convert between (out, in) and the stored layout of the weight, in both directions."""
        return matrix.T if self.transposed else matrix

    @property
    def merged(self) -> bool:
        """True if the layer's weight contains the update."""
        return self.frozen_weight is not None

    def obstacle(self, path: str = "") -> UserError | None:
        """Return the error for merging the layer at this path, or None if it can be merged."""
        if self.delta is None or self.delta.fixed:
            return None
        return no_matrix("the merge", path or self.plain_class.__name__)

    @torch.no_grad()
    def merge(self) -> None:
        """Write the effective weight, unless the layer is merged already.

        Raises:
            UserError: The layer cannot be merged, see `obstacle`.
        """
        if (problem := self.obstacle()) is not None:
            raise problem
        if self.delta is not None and not self.merged:
            weight = self.adapted_weight
            merged = self.swap_layout(self.delta.effective_weight(self.swap_layout(unsharded(weight))))
            self.frozen_weight = weight.detach().clone()
            if hasattr(weight, "full_tensor"):  # all processes have the sum, so that sharding needs no communication
                from torch.distributed.tensor import DTensor, Replicate

                merged = DTensor.from_local(merged, weight.device_mesh, [Replicate()], run_check=False)  # type: ignore[attr-defined]
                merged = merged.redistribute(placements=weight.placements)  # type: ignore[attr-defined]
            weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore W0 exactly."""
        if self.frozen_weight is not None:
            self.adapted_weight.copy_(self.frozen_weight)
            self.frozen_weight = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()  # state dicts contain W0 and unmerged updates
        super()._load_from_state_dict(*args, **kwargs)

    def adapted_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer's linear map, with the update unless it is disabled or merged."""
        # W0 of a merged layer stays sharded.
        weight = self.swap_layout(self.adapted_weight) if self.enabled else unsharded(self.base_weight)
        if self.delta is None or not self.enabled or self.merged:
            return F.linear(x, weight, bias)
        return self.delta.add(x, weight, bias)


class AdaptedLinear(AdaptedLayer, nn.Linear):
    """``nn.Linear`` with an update of its weight."""

    weight_name = "weight"

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer, (..., in) to (..., out)."""
        return self.adapted_linear(input, self.bias)


class AdaptedConv1D(AdaptedLayer):
    """transformers' ``Conv1D`` with an update of its weight, which is stored as (in, out)."""

    weight_name = "weight"
    transposed = True
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, (..., in) to (..., out)."""
        return self.adapted_linear(x, self.bias)


class AdaptedAttention(AdaptedLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with an update of its packed q/k/v weight.

    The output projection is called as a module, so that its own update is applied. All options of the plain layer work;
    the common case calls scaled dot product attention directly.
    """

    weight_name = "in_proj_weight"
    causal = False  # True if every (L, S) mask that the layer gets hides later positions and nothing else

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
        """Apply attention; arguments and results as in ``nn.MultiheadAttention.forward``."""
        q, k, v = self.adapted_linear(query, self.in_proj_bias).chunk(3, dim=-1)
        if not query is key is value:  # one product if all three inputs are the same tensor
            packed = self.adapted_linear(key, self.in_proj_bias)
            k = packed.chunk(3, dim=-1)[1]
            if key is not value:
                packed = self.adapted_linear(value, self.in_proj_bias)
            v = packed.chunk(3, dim=-1)[2]
        plain = self.bias_k is None and not self.add_zero_attn and key_padding_mask is None
        wrong = k.shape != v.shape or (is_causal and attn_mask is None)  # PyTorch's function raises for these
        if plain and not wrong and not need_weights and q.dim() == 3:
            return self.out_proj(self._attend(q, k, v, attn_mask)), None
        # Rare options: PyTorch's function on the projected q, k and v, with identity projections.
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

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Apply scaled dot product attention over the heads; a mask is (L, S) or (N * heads, L, S)."""
        if not self.batch_first:
            q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
        batch, length, _ = q.shape
        q, k, v = (t.view(*t.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for t in (q, k, v))
        causal = self.causal and mask is not None and mask.dim() == 2 and on_cuda(q)
        if causal:
            mask = None  # CUDA's flash attention takes no other mask
        if mask is not None:
            # True means "masked" in nn.MultiheadAttention and "visible" in scaled_dot_product_attention.
            mask = ~mask if mask.dtype == torch.bool else mask.to(q.dtype)
            mask = mask.reshape(batch, self.num_heads, *mask.shape[1:]) if mask.dim() == 3 else mask
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        attended = attended.transpose(1, 2).reshape(batch, length, self.embed_dim)
        return attended if self.batch_first else attended.transpose(0, 1)


class RowBlocks(DeltaWeight):
    """Updates of some row blocks (q, k or v) of a packed weight; the other rows are not changed.

    Args:
        blocks: Update of each block by name, in any order.
        rows: First row and last row + 1 of every block of the weight, in order, with or without an update.
    """

    def __init__(self, blocks: dict[str, DeltaWeight], rows: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.rows = rows
        self.fixed = all(delta.fixed for delta in blocks.values())
        for name, delta in blocks.items():
            self.add_module(name, delta)

    def blocks(self) -> dict[str, DeltaWeight]:
        """Return the updates by name of the block."""
        return {name: delta for name, delta in self.named_children() if isinstance(delta, DeltaWeight)}

    def change(self, weight: Tensor) -> Tensor:
        """Return the blocks' changes, with zeros in other rows, (out, in)."""
        return self._with_zeros(
            {name: block.change(weight[slice(*self.rows[name])]) for name, block in self.blocks().items()}
        )

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
        """Return the weight with each block's effective weight in its rows, (out, in)."""
        blocks, parts = self.blocks(), {name: weight[start:stop] for name, (start, stop) in self.rows.items()}
        return torch.cat([blocks[name].effective_weight(w) if name in blocks else w for name, w in parts.items()])

    def add(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply each block's fast path and concatenate the outputs."""
        blocks, outputs = self.blocks(), []
        for name, (start, stop) in self.rows.items():
            apply = blocks[name].add if name in blocks else F.linear
            outputs.append(apply(x, weight[start:stop], None if bias is None else bias[start:stop]))
        return torch.cat(outputs, -1)

    def contribution(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """Return the blocks' contributions, with zeros in other columns, (..., out)."""
        parts = {
            name: block.contribution(x, lambda own=self.rows[name]: weight()[slice(*own)])  # type: ignore[misc]
            for name, block in self.blocks().items()
        }
        return self._with_zeros(parts, -1)


class BuiltWeight(AdaptedLayer):
    """Adapted layer that uses its effective weight in the stored shape."""

    weight_name: ClassVar[str] = "weight"

    def acting_weight(self) -> Tensor:
        """Return the weight in use: adapted, or frozen if the update is disabled."""
        if not self.enabled:
            return unsharded(self.adapted_weight if self.frozen_weight is None else self.frozen_weight)
        if self.delta is None or self.merged:
            return self.adapted_weight
        return self.swap_layout(self.delta.effective_weight(self.swap_layout(unsharded(self.adapted_weight))))


class AdaptedConv2d(BuiltWeight, nn.Conv2d):
    """``nn.Conv2d`` or a subclass with an update of its weight (out, in / groups, height, width).

    The update is a matrix (out, in / groups * height * width). With dropout, the update convolves the input after
    dropout, and the frozen weight convolves the full input. An update that depends on the input is applied apart, too.
    A subclass with its own forward is called with the built weight instead of its weight.
    """

    def swap_layout(self, matrix: Tensor) -> Tensor:
        """Convert between four dimensions and (out, in), in both directions."""
        return matrix.view(self.adapted_weight.shape) if matrix.dim() == 2 else matrix.flatten(1)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer, (n, in, height, width) to (n, out, height', width')."""
        if self.delta is None or not self.enabled or self.merged or (self.delta.fixed and not drops(self.delta)):
            return self._convolved(input, self.acting_weight(), self.bias)
        plain = self._convolved(input, self.adapted_weight, self.bias)
        weight = self.base_weight

        def product(x: Tensor, change: Tensor) -> Tensor:
            return self._convolved(x, like(change, x).view(-1, *self.adapted_weight.shape[1:]), None)

        return plain + like(self.delta.apart(input, weight, product, self.groups), plain)

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor
        if has_own_forward(self.plain_class):
            twin = self.plain_class.__new__(self.plain_class)
            twin.__dict__ = {**self.__dict__, "_parameters": {**self._parameters, "weight": weight, "bias": bias}}
            output = self.plain_class.forward(twin, x)
        else:
            output = self._conv_forward(x, weight, bias)
        return output


class ReadLinear(BuiltWeight, nn.Linear):
    """``nn.Linear`` with an update, for parent modules that read its weight: ``layer.weight`` is W0 + delta.

    The state dict still contains W0, because parameters are stored by name.
    """

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Weight in use, (out, in)."""
        return self.acting_weight()


def has_own_forward(kind: type[nn.Module]) -> bool:
    """Return True if a convolution class overrides the forward methods of ``nn.Conv2d``."""
    own = (getattr(kind, name) is not getattr(nn.Conv2d, name) for name in ("forward", "_conv_forward"))
    return issubclass(kind, nn.Conv2d) and any(own)


def drops(delta: DeltaWeight) -> bool:
    """Return True if dropout of an update, or of a part of it, is active."""
    return any(isinstance(module, DeltaWeight) and module.drops for module in delta.modules())


def check_input_acts(model: nn.Module, path: str, delta: DeltaWeight) -> None:
    """Raise an error for an update that needs the layer's input, where the layer only builds a weight.

    Raises:
        UserError: A parent module reads the layer's weight, or a convolution has its own forward, and the update has
            dropout or depends on the input.
    """
    dropout = any(isinstance(module, DeltaWeight) and module.dropout for module in delta.modules())
    if delta.fixed and not dropout:
        return
    kind = type(model.get_submodule(path))
    why = f"{kind.__name__} has a forward of its own" if has_own_forward(kind) else ""
    if issubclass(kind, nn.Linear) and (reader := reader_of(model, path)) is not None:
        why = f"{reader.__name__} reads its weight"
    if why and not delta.fixed:
        raise UserError(f"{path}: {why}, so its update cannot depend on the input. Exclude the layer.")
    if why:
        raise UserError(
            f"{path}: {why}, so dropout on its update is not possible. Set dropout to 0, or exclude the layer."
        )


class AdaptedQuantized(AdaptedLayer):
    """``x W0 + x (W - W0)`` with a packed W0, which is not changed; the first product is the layer's own forward.

    `adapted_class` creates a subclass of this class and the layer's class, because a library's forward calls other
    methods of its class.
    """

    weight_name = "weight"

    @property
    def base_weight(self) -> Tensor:
        """Dequantized W0, (out, in), computed at each access."""
        return dequantize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, (..., in) to (..., out)."""
        output: Tensor = super().forward(x)
        if self.delta is None or not self.enabled:
            return output
        return output + self.delta.contribution(x, lambda: self.base_weight).to(output.dtype)

    def obstacle(self, path: str = "") -> UserError | None:
        """Return the error for merging the layer, because nothing can be added to a packed weight."""
        if self.delta is None:
            return None
        name = self.plain_class.__name__
        return UserError(
            f"{f'{path} ({name})' if path else name} is quantized, so nothing can be added to its weight. Load the "
            "base model without quantization, load the adapter into it, and merge there."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Support pickling, which cannot find classes created at run time."""
        return (_empty, (self.plain_class,), *super().__reduce_ex__(protocol)[2:])


@functools.cache
def adapted_class(plain: type[nn.Module]) -> type[AdaptedQuantized]:
    """Return the adapted class for a quantized layer class."""
    own = (PackedLinear, plain) if plain.forward is nn.Linear.forward else (plain,)
    return type(f"Adapted{plain.__name__}", (AdaptedQuantized, *own), {"__module__": __name__})


def _empty(plain: type[nn.Module]) -> nn.Module:
    kind = adapted_class(plain)  # type: ignore[arg-type]  # a class is hashable
    return kind.__new__(kind)


def attach(model: nn.Module, updates: Mapping[str, DeltaWeight]) -> None:
    """Convert plain layers to adapted ones; `operations.detach` converts them back.

    Args:
        model: Model that contains the layers.
        updates: Update of each layer by path.
    """
    kinds: dict[str, type[AdaptedLayer]] = {}
    # Before any layer changes, because an adapted attention layer calls its output projection instead of reading it.
    for path in updates:
        layer = model.get_submodule(path)
        if isinstance(layer, nn.MultiheadAttention):
            kinds[path] = AdaptedAttention
        elif isinstance(layer, nn.Conv2d):
            kinds[path] = AdaptedConv2d
        elif is_quantized(layer):
            kinds[path] = adapted_class(type(layer))  # type: ignore[arg-type]
        elif is_conv1d(layer):
            kinds[path] = AdaptedConv1D
        else:
            kinds[path] = AdaptedLinear if reader_of(model, path) is None else ReadLinear
    for layer in [each for path, each in model.named_modules() if path not in updates and is_quantized(each)]:
        if type(layer).forward is nn.Linear.forward:  # else a training keeps its unpacked weight
            adapted_class(type(layer)).attach(layer, None)  # type: ignore[arg-type]
    for path, delta in updates.items():
        kinds[path].attach(model.get_submodule(path), delta)
        parent = model.get_submodule(path.rpartition(".")[0])
        if type(parent) is nn.MultiheadAttention:  # its plain forward reads the weight of out_proj
            AdaptedAttention.attach(parent, None)
    set_fast_paths(model, False)


def set_fast_paths(model: nn.Module, on: bool) -> None:
    """Switch PyTorch's fused inference of transformer encoders off, or on again, for modules with adapted layers.

    The fused path reads the weights directly and would ignore every update.
    """
    attributes = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
    for module in model.modules():
        for kind, name in attributes.items():
            if not isinstance(module, kind) or not hasattr(module, name):
                continue
            if on and hasattr(module, f"plain_{name}"):
                setattr(module, name, getattr(module, f"plain_{name}"))
                delattr(module, f"plain_{name}")
            elif not on and any(isinstance(child, AdaptedLayer) for child in module.modules()):
                setattr(module, f"plain_{name}", getattr(module, name))
                setattr(module, name, 0)


class WeightedSum(DeltaWeight):
    """W0 + sum_i w_i (W_i - W0), where W_i is the effective weight of update i (task arithmetic).

    For additive methods this is W0 + sum_i w_i delta_i (Ilharco et al., 2023); DoRA is not additive.

    Args:
        parts: Updates of any methods; gradients reach their parameters.
        weights: Factor of each update.
    """

    def __init__(self, parts: Sequence[DeltaWeight], weights: Sequence[float]) -> None:
        super().__init__()
        self.parts, self.weights = nn.ModuleList(parts), tuple(weights)
        self.fixed = all(part.fixed for part in parts)

    def _sum(self, term: Callable[[DeltaWeight], Tensor]) -> Tensor:
        pairs: zip[tuple[DeltaWeight, float]] = zip(self.parts, self.weights, strict=True)  # type: ignore[arg-type]
        first, *others = (term(part) if factor == 1 else factor * term(part) for part, factor in pairs)
        return sum(others, first)

    def change(self, weight: Tensor) -> Tensor:
        """Return sum_i w_i (W_i - W0), (out, in)."""
        return self._sum(lambda part: part.change(weight))

    def add(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the effective weight; if a part has active dropout or is not fixed, add each part's outputs."""
        if self.fixed and not drops(self):
            return F.linear(x, self.effective_weight(weight), bias)
        plain = F.linear(x, weight, bias)
        return plain + like(self.contribution(x, lambda: weight), plain)

    def contribution(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """Return the weighted sum of the parts' contributions, (..., in) to (..., out)."""
        return self._sum(lambda part: part.contribution(x, weight))

    def apart(self, x: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor], groups: int) -> Tensor:
        """Return the weighted sum of the parts' contributions, each with its own dropout."""
        return self._sum(lambda part: part.apart(x, weight, product, groups))
