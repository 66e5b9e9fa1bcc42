"""AdaLoRA: a budget of ranks that training distributes over the layers (Zhang et al., ICLR 2023, arXiv 2303.10512)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import (
    Adapter,
    FactoredDelta,
    Layers,
    Part,
    PeftContent,
    PeftForm,
    Procedure,
    Rank,
)
from randlora_pl.adapters.methods.lora import with_ranks
from randlora_pl.adapters.random_bases import Bases, WeightShape, draw_parameter, trainable
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Count, NotNegative, Probability, misfit

_START = 0.02  # standard deviation of A and B at the start, in the paper's code and in PEFT
_TINY = 1e-5  # PEFT scales by lora_alpha / (init_r + 1e-5)


class AdaLoRA(Adapter):
    """AdaLoRA: delta = scaling * B diag(E) A, whose least important ranks are pruned during training.

    The ranks that are kept in all layers together fall from ``rank`` to ``target_rank`` times the number of layers.
    In a training loop of one's own, call the report's `Procedure` (`randlora_pl.adapters.base`).

    Examples:
        >>> report = inject(model, AdaLoRA(rank=6, target_rank=4))
        >>> report.trainable, report.procedure.budget(step=0, total=100), report.procedure.budget(step=99, total=100)
        (27756, 108, 72)
    """

    rank: Rank = 48
    """Rank r of each layer at the start. A number, or numbers by pattern of layer names."""
    target_rank: Count | None = None
    """Mean rank of the layers at the end. Default: two thirds of ``rank``, 32 of 48."""
    alpha: float | dict[str, float] = 96.0
    """The update is scaled by alpha / r, with the rank at the start. A number, or numbers by pattern, as ``rank``."""
    warmup: Annotated[float, NotNegative] = 0.1
    """Fraction of the run before the first pruning."""
    final: Annotated[float, NotNegative] = 0.3
    """Fraction of the run after the last pruning, at least one step, with fixed ranks."""
    every: Count = 10
    """Optimizer steps between two prunings."""
    beta1: Annotated[float, Probability] = 0.85
    """Decay of the average importance."""
    beta2: Annotated[float, Probability] = 0.85
    """Decay of its average deviation."""
    gamma: Annotated[float, NotNegative] = 0.1
    """Weight of the penalty that keeps A and B orthogonal (the paper's scripts: 0.1 to 0.5)."""
    orthogonality: Literal["code", "paper"] = "code"
    """``code`` is the mean norm of A A^T - I and B^T B - I, as in the released code; ``paper`` is the sum of their
    squared norms (equation 4)."""

    learning_rates = (1e-3, 1e-3, 5e-4)  # its scripts: 5e-4 (MNLI) to 2.2e-3 (STS-B)
    proportional_to = ("E",)

    peft = PeftForm(
        "ADALORA",
        frozenset(
            {  # those that the import reads, or whose value changes nothing; PEFT ignores r
                *("r", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"),
                *("total_step", "rank_pattern", "lora_alpha", "lora_dropout", "init_lora_weights"),
            }
        ),
        ("lora_A", "lora_B", "lora_E"),
        least_rank=None,
        starts=("gaussian", "orthogonal", "eva", "mica", "pissa", "olora"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.warmup + self.final < 1:
            raise UserError(
                f"AdaLoRA: warmup is {self.warmup} and final is {self.final}. Set fractions of the run whose sum is "
                "below 1."
            )

    def count(self, shape: WeightShape) -> int:
        """Return r (out + in + 1), which train until the end; fewer remain."""
        return self.rank_of(shape) * (shape.out_features + shape.in_features + 1)

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> "AdaLoRADelta":
        """Create the update of one weight, with A (r, in), E (r) and B (out, r)."""
        return AdaLoRADelta(self, shape, weight)

    def procedure(self, model: nn.Module) -> "Pruning":
        """Return the pruning of the model's updates."""
        return Pruning(self, [module for module in model.modules() if isinstance(module, AdaLoRADelta)])

    def in_peft(self, parts: list[Part]) -> tuple[Adapter, list[Part]]:
        """Return the LoRA with the same update: the ranks that are kept, without layers that have none."""
        used = {part.path for part in parts if bool(_kept(part).any())}
        left = []
        for part in (each for each in parts if each.path in used):
            kept, own = _kept(part), part.tensors
            if not bool(kept.any()):  # a block next to others: a rank of zeros keeps its place
                kept[0] = True
            factors = {"A": (own["E"][:, None] * own["A"])[kept], "B": own["B"][:, kept]}
            left.append(replace(part, tensors=factors))
        scalings = {part.shape.layer: self.scaling_of(part.shape) for part in left}
        ranks = {part.shape.layer: len(part.tensors["A"]) for part in left}
        return with_ranks(ranks, scalings, dropout=self.dropout, qkv=self.qkv, seed=self.seed), left

    @classmethod
    def from_peft(cls, content: PeftContent) -> tuple[Adapter, Layers, None]:
        """Convert PEFT's AdaLoRA; pruned ranks are zero, and stay so unless further training prunes others."""
        config, source = content.config, content.source
        if wrong := misfit(config, _PeftKinds):
            raise UserError(f"{source}: {wrong} in its config; copy it again.")
        rank, target = config.get("init_r", 12), config.get("target_r", 8)
        ours: Layers = {}
        for layer, own in content.layers.items():
            a, b, e = (own[f"lora_{name}"] for name in "ABE")
            most = min(rank, 1 << 20)  # a damaged config may say any number
            pattern = (config.get("rank_pattern") or {}).get(f"{layer}.lora_E", [True] * most)
            kept = torch.tensor(pattern, dtype=torch.bool)
            if len(kept) != rank or any(each.dim() != 2 for each in (a, b, e)) or len(e) != int(kept.sum()):
                raise UserError(
                    f"{source}: lora_E of {layer} has shape {tuple(e.shape)}, and its config keeps {sum(pattern)} of "
                    f"{rank} ranks; it is damaged, copy it again."
                )
            ours[layer] = {
                "A": _spread(a, kept, 0),
                "B": _spread(b, kept, 1),
                "E": _spread(e[:, 0] * (rank / (rank + _TINY)), kept, 0),
                "mask": kept,
            }
        alpha = float(config.get("lora_alpha", 8))
        adapter = cls(
            rank=rank,
            target_rank=target if 1 <= target <= rank else None,
            alpha=alpha if alpha > 0 else float(rank),
            dropout=float(config.get("lora_dropout", 0.0)),
        )
        return adapter, ours, None


class _PeftKinds(TypedDict, total=False):
    """Types of the keys that the import reads."""

    init_r: int
    target_r: int
    lora_alpha: float
    lora_dropout: float
    rank_pattern: dict[str, list[bool]] | None


def _kept(part: Part) -> Tensor:
    """Return the ranks with an effect, now or after further training: bool (r)."""
    return part.tensors["mask"] | (part.tensors["E"] != 0)


def _spread(tensor: Tensor, kept: Tensor, side: int) -> Tensor:
    """Return a tensor with zeros at the ranks of a side that are not kept; unchanged if the ranks do not fit."""
    if tensor.shape[side] != int(kept.sum()):
        return tensor
    shape = list(tensor.shape)
    shape[side] = len(kept)
    return tensor.new_zeros(shape).index_copy_(side, kept.nonzero()[:, 0], tensor)


class AdaLoRADelta(FactoredDelta):
    """scaling * B diag(E) A of one weight; A and B are normal at the start, and E is zero."""

    kept = ("mask",)
    mask: Tensor  # bool (r), the ranks that the last pruning has kept
    target: int  # ranks that the layer adds to the budget at the end

    def __init__(self, adapter: AdaLoRA, shape: WeightShape, weight: Tensor) -> None:
        super().__init__(adapter.dropout)
        rank, layer, key = adapter.rank_of(shape), shape.layer, adapter.key
        self.layer, self.scaling = layer, adapter.scaling_of(shape)
        self.target = max(1, round(rank * 2 / 3)) if adapter.target_rank is None else adapter.target_rank
        if not 1 <= self.target <= rank:
            raise UserError(
                f"AdaLoRA: target_rank is {self.target}, and {layer} starts with rank {rank}. Set a target_rank from "
                f"1 to {rank}, or a larger rank."
            )
        self.A = draw_parameter(weight, key, f"adalora/A/{layer}", rank, shape.in_features, "normal", _START)
        self.E = trainable(weight, rank, fill=0.0)
        self.B = draw_parameter(weight, key, f"adalora/B/{layer}", shape.out_features, rank, "normal", _START)
        self.register_buffer("mask", torch.ones(rank, dtype=torch.bool, device=weight.device))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return scaled B diag(E), (out, r), and A, (r, in)."""
        return self.B * (self.E * self.scaling), self.A


class Pruning(Procedure):
    """Importance of every rank, and the pruning of the least important ones over all layers.

    With w after the step and its gradient g, of every entry of A, B and E:

        I = |w g|;  mean <- beta1 mean + (1 - beta1) I;  deviation <- beta2 deviation + (1 - beta2) |I - mean|

    An entry has the score mean * deviation. A rank has the score of its entry of E, plus the mean scores of its row of
    A and its column of B. The model's order of the updates decides between equal scores.
    """

    def __init__(self, adapter: AdaLoRA, updates: Sequence[AdaLoRADelta]) -> None:
        self.adapter, self.updates = adapter, updates
        self.mean: list[Tensor] = []  # of the entries of A, B and E of every update
        self.deviation: list[Tensor] = []
        self.ended = False  # True once the last pruning is done

    @property
    def _entries(self) -> list[Tensor]:
        return [tensor for update in self.updates for tensor in (update.A, update.B, update.E)]

    def start(self, model: nn.Module) -> None:
        """Set the averages to zero."""
        self.ended = False
        self.mean, self.deviation = ([torch.zeros_like(tensor) for tensor in self._entries] for _ in range(2))

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, and whether the last pruning is done."""
        return {"mean": list(self.mean), "deviation": list(self.deviation), "ended": self.ended}

    def state_size(self) -> int:
        """Return the numbers in both averages."""
        return 2 * sum(tensor.numel() for tensor in self._entries)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        self.ended = state["ended"]
        for own, saved in ((self.mean, state["mean"]), (self.deviation, state["deviation"])):
            for tensor, value in zip(own, saved, strict=True):
                tensor.copy_(value)

    def penalty(self) -> Tensor | None:
        """Return gamma times the distance of A A^T and B^T B from the identity, a scalar."""
        if not self.adapter.gamma:
            return None
        shapes: dict[torch.Size, list[Tensor]] = {}
        for update in self.updates:
            for rows in (update.A, update.B.T):
                shapes.setdefault(rows.shape, []).append(rows)
        total = self.updates[0].E.new_zeros(())
        with torch.autocast(total.device.type, enabled=False):  # bfloat16 would round more than is left of the distance
            for matrices in shapes.values():  # few kernels for many layers
                rows = torch.stack(matrices)
                off = rows @ rows.mT - torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
                norms = torch.linalg.vector_norm(off, dim=(1, 2))  # its gradient at zero is zero
                total = total + (norms if self.adapter.orthogonality == "code" else norms.square()).sum()
        count = 2 * len(self.updates) if self.adapter.orthogonality == "code" else 1
        return total * (self.adapter.gamma / count)

    def phases(self, total: int) -> tuple[int, int]:
        """Return the last step before the first pruning may be, and the first step with fixed ranks, from 0."""
        warmup, final = (int(round(part * total, 6)) for part in (self.adapter.warmup, self.adapter.final))
        return warmup, total - max(1, final)

    def budget(self, step: int, total: int) -> int:
        """Return the ranks of all layers together after a step, counted from 0, of ``total`` steps."""
        first, last = sum(len(update.E) for update in self.updates), sum(update.target for update in self.updates)
        start, end = self.phases(total)
        if step >= end:
            return last
        left = 1.0 if step <= start else 1 - (step - start) / (end - start)
        return int(last + (first - last) * left**3)

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Update the averages, and prune if that is due; the host does not wait for the device."""
        super().after_step(step, total)
        start, end = self.phases(total)
        if step < end:
            entries = self._entries
            gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in entries]
            importance = torch._foreach_mul(entries, gradients)
            torch._foreach_abs_(importance)
            torch._foreach_lerp_(self.mean, importance, 1 - self.adapter.beta1)
            torch._foreach_sub_(importance, self.mean)
            torch._foreach_abs_(importance)
            torch._foreach_lerp_(self.deviation, importance, 1 - self.adapter.beta2)
        if step >= end and self.ended:
            torch._foreach_mul_([update.E for update in self.updates], [update.mask for update in self.updates])
        elif step >= end or (step > start and step % self.adapter.every == 0):
            self._prune(self.budget(step, total))
        self.ended = step >= end  # a resumed run may have another length

    def scores(self) -> Tensor:
        """Return the score of every rank, layer by layer."""
        entries = torch._foreach_mul(self.mean, self.deviation)
        triplets = zip(entries[::3], entries[1::3], entries[2::3], strict=True)
        return torch.cat([e + a.mean(1) + b.mean(0) for a, b, e in triplets])

    def _prune(self, budget: int) -> None:
        """Keep the ranks of the highest scores, of equal scores the first; keep all if a score is not finite."""
        scores, before = self.scores(), torch.cat([update.mask for update in self.updates])
        order = scores.sort(descending=True, stable=True).indices
        best = torch.zeros_like(before).index_fill_(0, order[:budget], True)
        usable = scores.isfinite().all()
        ranks = [len(update.E) for update in self.updates]
        for update, mask in zip(self.updates, torch.split(torch.where(usable, best, before), ranks), strict=True):
            update.mask.copy_(mask)
        torch._foreach_mul_([update.E for update in self.updates], torch.split(best | ~usable, ranks))

    def finish(self) -> dict[str, Any]:
        """Return the ranks that are kept, by layer and in all, and their number of parameters."""
        ranks = {update.layer: int(update.mask.sum()) for update in self.updates}
        sizes = (ranks[each.layer] * (len(each.B) + each.A.shape[1] + 1) for each in self.updates)
        return {"adalora/triplets": sum(ranks.values()), "adalora/parameters": sum(sizes), "adalora/ranks": ranks}
