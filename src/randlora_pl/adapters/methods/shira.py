"""SHiRA: an update with few entries at fixed places (Bhardwaj et al., 2024, arXiv:2406.13175)."""

from typing import Literal

import torch
from torch import Tensor

from randlora_pl.adapters.base import Adapter, DeltaWeight, Layers, Part, PeftContent, PeftFile, PeftForm, Rank
from randlora_pl.adapters.kernels.common import added
from randlora_pl.adapters.random_bases import Bases, WeightShape, trainable
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.rng import philox, stream


class SHiRA(Adapter):
    """SHiRA: a sparse update with as many trained entries as a LoRA of rank r has parameters.

    Examples:
        >>> inject(model, SHiRA(rank=4)).trainable  # as many as of LoRA(rank=4)
        18432
    """

    rank: Rank = 32
    """r of the r (out + in) trained entries; it does not limit the rank of the update. A number, or numbers by pattern
    of layer names."""
    places: Literal["random", "top"] = "random"
    """Choice of the places of these entries: ``random``, or ``top`` for the largest absolute values of the frozen
    weight. Files store them."""

    learning_rates = (3e-4, 3e-4, 1e-4)  # PEFT's benchmark, on a language model
    proportional_to = ("values",)
    group = "full rank"
    peft = PeftForm("SHIRA", frozenset({"r", "mask_type", "random_seed"}), ("shira_weight", "shira_indices"))

    @property
    def reads_weight(self) -> bool:  # type: ignore[override]
        """True if the places depend on the frozen weight."""
        return self.places == "top"

    def largest_rank(self, shape: WeightShape) -> int:
        """Return the largest r for which a weight has r (out + in) entries."""
        return shape.out_features * shape.in_features // (shape.out_features + shape.in_features)

    def rank_of(self, shape: WeightShape) -> int:
        """Return the rank for one layer.

        Raises:
            UserError: The weight has fewer than r (out + in) entries.
        """
        rank: int = self.value("rank", shape)
        if rank > (most := self.largest_rank(shape)):
            sides = f"{shape.out_features} x {shape.in_features}"
            raise UserError(
                f"SHiRA: rank {rank} asks for more entries than {shape.layer} has ({sides}); choose a rank up to "
                f"{most}, or leave this layer out of the targets."
            )
        return rank

    def count(self, shape: WeightShape) -> int:
        """Return r (out + in)."""
        return self.rank_of(shape) * (shape.out_features + shape.in_features)

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> "SHiRADelta":
        """Create the update of one weight, with its places and values (r (out + in))."""
        return SHiRADelta(self, shape, weight)

    def to_peft(self, parts: list[Part], bases: Bases | None) -> PeftFile:
        """Convert the places: PEFT stores their rows and columns, and has one rank."""
        tensors: dict[str, Tensor] = {}
        for part in parts:
            places, width = part.tensors["places"], part.shape.in_features
            tensors[f"{part.path}.shira_weight"] = part.tensors["values"]
            tensors[f"{part.path}.shira_indices"] = torch.stack([places // width, places % width]).to(torch.int32)
        ranks = sorted({self.rank_of(part.shape) for part in parts})
        if len(ranks) > 1:
            raise UserError(f"its layers have ranks {' and '.join(map(str, ranks))}; PEFT's SHiRA has one rank")
        return {"r": ranks[0], "mask_type": "random", "random_seed": None, "init_weights": True}, tensors

    @classmethod
    def from_peft(cls, content: PeftContent) -> tuple[Adapter, Layers, None]:
        """Convert PEFT's SHiRA, with the places of any mask."""
        ours: Layers = {}
        for layer, own in content.layers.items():
            shape, indices = content.shapes[layer], own["shira_indices"].long()
            sides = torch.tensor([[shape.out_features], [shape.in_features]])
            good = indices.dim() == 2 and len(indices) == 2 and bool(((indices >= 0) & (indices < sides)).all())
            places, order = (indices[0] * shape.in_features + indices[1]).sort() if good else (indices, indices)
            if not good or not bool((places[1:] > places[:-1]).all()) or len(places) != len(own["shira_weight"]):
                raise UserError(
                    f"{content.source}: shira_indices of {layer} are not distinct places in {shape.out_features} x "
                    f"{shape.in_features}, one for each value; it belongs to another model, or is damaged."
                )
            ours[layer] = {"values": own["shira_weight"][order], "places": places}
        return cls(rank=int(content.config["r"])), ours, None


class SHiRADelta(DeltaWeight):
    """The entries of one weight's update: trained values, zero at the start, and their places.

    A step has one matrix of a weight's size at a time, out of whose gradient it takes the values', and keeps none.
    """

    kept = ("places",)
    uses_weight, rebuilds = False, True
    places: Tensor  # flat indices in the matrix (out, in), ascending and distinct, int64 for large matrices, else int32

    def __init__(self, adapter: SHiRA, shape: WeightShape, weight: Tensor) -> None:
        super().__init__(adapter.dropout)
        self.out_features, self.in_features = shape.out_features, shape.in_features
        count, size = adapter.count(shape), shape.out_features * shape.in_features
        self.values, self.indexes = trainable(weight, count, fill=0.0), {"places": size}
        if weight.is_meta:
            places = torch.empty(count, dtype=torch.int64, device=weight.device)
        elif adapter.places == "top":
            order = weight.detach().abs().flatten().argsort(descending=True, stable=True)
            places = order[:count].sort().values
        else:
            places = distinct(adapter.key, f"shira/{shape.layer}", count, size).to(weight.device)
        self.register_buffer("places", places.to(torch.int32 if size < 1 << 31 else torch.int64))

    def change(self, weight: Tensor) -> Tensor:
        """Return the update as a dense matrix, (out, in)."""
        flat = self.values.new_zeros(self.out_features * self.in_features)
        return flat.scatter(0, self.places.long(), self.values).view(self.out_features, self.in_features)

    def effective_weight(self, weight: Tensor) -> Tensor:
        """Return W0 with the values added at their places, (out, in)."""
        flat, places = weight.reshape(-1), self.places.long()
        return flat.scatter(0, places, added(flat[places], self.values)).view(weight.shape)


def distinct(seed: int, name: str, count: int, size: int) -> Tensor:
    """Draw distinct integers below ``size``: the first ``count`` different ones of a stream of uniform numbers.

    Args:
        seed: Seed of the adapter.
        name: Name of the stream.
        count: Number of integers.
        size: Upper limit, at least ``count``.

    Returns:
        int64 tensor (count) on the CPU, ascending; the same on every machine.
    """
    if 2 * count > size:  # the others are fewer
        rest = torch.ones(size, dtype=torch.bool)
        rest[distinct(seed, name, size - count, size)] = False
        return rest.nonzero().flatten()
    numbers = torch.empty(0, dtype=torch.int64)
    firsts = numbers
    while (missing := count - len(firsts)) > 0:
        index = torch.arange(len(numbers) // 2, len(numbers) // 2 + missing // 2 + missing // 16 + 16)
        rest = index.new_zeros(1)
        a, b, c, d = philox(seed, (index, rest, rest, rest + stream(name)))
        pairs = torch.stack([(a << 30) | (b >> 2), (c << 30) | (d >> 2)], dim=1)  # numbers of 62 bits
        numbers = torch.cat([numbers, pairs.flatten() % size])
        order = numbers.argsort(stable=True)
        ordered = numbers[order]
        first = torch.ones(len(order), dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        firsts = order[first].sort().values  # where each number comes for the first time
    return numbers[firsts[:count]].sort().values
