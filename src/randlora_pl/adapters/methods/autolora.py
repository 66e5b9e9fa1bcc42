"""AutoLoRA: a search for the rank of each weight (Zhang et al., NAACL 2024, arXiv:2403.09113).

    delta W = alpha/K * B diag(a) A,  a = softmax(v)

v (K) is a kept buffer, which `selection.SelectionSearch` trains on samples that A and B do not see. The result is the
number of components with a share a_k of at least 1/K, for a new LoRA. The same search chooses among RandLoRA's bases
(section C.5.1 of the RandLoRA paper): delta W = alpha/r * sum_j a_j B_j diag(lambda_j) A diag(gamma_j).
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import Adapter, DeltaWeight, Rank
from randlora_pl.adapters.methods.lora import LoRA, LoRADelta
from randlora_pl.adapters.methods.randlora import RandLoRA
from randlora_pl.adapters.methods.randlora_update import RandLoRADelta
from randlora_pl.adapters.methods.selection import SelectionSearch, components
from randlora_pl.adapters.peft_form import Part
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.adapters.weights import WeightShape
from randlora_pl.utils.options import Count

RANK, ALPHA = 8, 16.0
"""Defaults of the released code."""


class AutoLoRA(Adapter):
    """AutoLoRA: searches the rank of each weight, for a LoRA that is then trained with the ranks found.

    Examples:
        >>> report = inject(model, AutoLoRA(rank=4))
        >>> report.trainable
        18432
        >>> set(report.procedure.counts().values())  # all of 4 equal components, before a search
        {4}
    """

    rank: Rank = RANK
    """Number K of components of each weight, the largest rank. A number, or numbers by pattern of layer names. With
    ``select: bases`` the rank r of RandLoRA's bases."""
    alpha: float | dict[str, float] = ALPHA
    """The update is scaled by alpha / rank. A number, or numbers by pattern, as ``rank``."""
    select: Literal["ranks", "bases"] = "ranks"
    """``ranks`` searches the rank of a LoRA, ``bases`` the number of bases of a RandLoRA."""
    order: Literal["first", "unrolled"] = "first"
    """``first`` takes the gradient of v at the present weights, one more pass per step; ``unrolled`` also through the
    next step of the weights, four more passes."""
    every: Count = 1
    """Optimizer steps from one step of v to the next."""

    learning_rates = (3e-4, 3e-4, 3e-4)  # its code, for RoBERTa
    searches = True  # data modules hold out training samples for it

    @property
    def selected(self) -> LoRA | RandLoRA:
        """Method whose components are selected."""
        rank = {**self.rank, ".*": RANK} if isinstance(self.rank, dict) else self.rank
        alpha = {**self.alpha, ".*": ALPHA} if isinstance(self.alpha, dict) else self.alpha
        options: dict[str, Any] = {"dropout": self.dropout, "qkv": self.qkv, "seed": self.seed}
        if self.select == "ranks":
            return LoRA(rank=rank, alpha=alpha, **options)
        return RandLoRA(rank=rank, alpha=alpha, memory="low", **options)  # a step has several S, so none is kept

    def count(self, shape: WeightShape) -> int:
        """Return the parameters of the selected method; v (K) is a buffer."""
        return self.selected.count(shape)

    def bases(self, shapes: list[WeightShape], device: torch.device) -> Bases | None:
        """Return the bases of RandLoRA, or None."""
        return self.selected.bases(shapes, device)

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> DeltaWeight:
        """Create the update of one weight, with v = 0."""
        selected = self.selected
        if isinstance(selected, LoRA):
            return SelectedRanks(selected, shape, weight)
        assert bases is not None
        return SelectedBases(selected, shape, weight, bases)

    def in_peft(self, parts: list[Part]) -> tuple[Adapter, list[Part]]:
        """Return the LoRA, or with ``select: bases`` the RandLoRA, with the same update."""
        found = []
        for part in parts:
            tensors = dict(part.tensors)
            shares = tensors.pop("v").double().softmax(0)
            name = "B" if self.select == "ranks" else "lambdas"
            scaled = tensors[name].double() * (shares if self.select == "ranks" else shares[:, None])
            found.append(replace(part, tensors=tensors | {name: scaled.float()}))
        return self.selected, found

    def procedure(self, model: nn.Module) -> SelectionSearch:
        """Return the search."""
        updates = [each for each in model.modules() if isinstance(each, SelectedRanks | SelectedBases)]
        usual = LoRA() if self.select == "ranks" else RandLoRA()
        names = ("dropout", "qkv") if self.select == "ranks" else ("rank", "alpha", "dropout", "qkv")
        selected = self.selected.options()
        options = {name: selected[name] for name in names if selected[name] != usual.options()[name]}
        return SelectionSearch(self.order == "unrolled", self.every, updates, usual.method(), options)


class SelectedRanks(LoRADelta):
    """alpha/K * B diag(softmax(v)) A of one weight."""

    kept = ("v",)
    v: Tensor

    def __init__(self, adapter: LoRA, shape: WeightShape, weight: Tensor) -> None:
        super().__init__(adapter, shape, weight)
        self.shape = shape
        self.register_buffer("v", self.A.new_zeros(len(self.A)))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return B with scaled columns, (out, K), and A, (K, in)."""
        return self.B * (self.v.softmax(0) * self.scaling), self.A

    def found(self) -> dict[str, float]:
        """Return LoRA's options for the components found, at alpha/K: K times the search's scaling at equal shares."""
        rank = components(self.v)
        return {"rank": rank, "alpha": rank * self.scaling}


class SelectedBases(RandLoRADelta):
    """alpha/r * sum_j softmax(v)_j B_j diag(lambda_j) A diag(gamma_j) of one weight."""

    kept = ("v",)
    v: Tensor

    def __init__(self, adapter: RandLoRA, shape: WeightShape, weight: Tensor, bases: Bases) -> None:
        super().__init__(adapter, shape, weight, bases)
        self.shape = shape
        self.register_buffer("v", self.lambdas.new_zeros(self.count))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return lambda (n, r) with scaled rows, gamma (n, d) and A (r, d)."""
        lambdas, gammas, a = super().tensors()
        return lambdas * self.v.softmax(0)[:, None], gammas, a

    def found(self) -> dict[str, float]:
        """Return RandLoRA's options for the components found."""
        return {"num_bases": components(self.v)}
