"""Methods that train a model's own tensors: full fine-tuning, BitFit, the linear probe, GaLore and Fira.

GaLore and Fira are full fine-tuning with the moments of chosen matrices in a subspace of their gradient. The state of
their optimizer has only tensors and numbers, so checkpoints load with ``weights_only=True``. Moments are float32
whatever the dtype of the weights: in bfloat16, 0.999 v rounds to v, so a second moment would never decay.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Collection
from dataclasses import field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import Adapter, DeltaWeight
from randlora_pl.adapters.derived import signs_of
from randlora_pl.adapters.random_bases import Bases, WeightShape
from randlora_pl.adapters.sites import find_sites, weight_key
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Count, Positive


class BaseWeightMethod(Adapter):
    """Base of methods without an update, which mark tensors of the model as trainable."""

    dropout: float = field(init=False, default=0.0)
    qkv: Any = field(init=False, default="packed")
    match: str | None = field(init=False, default=None)
    seed: int | None = field(init=False, default=None)

    group = "whole"
    trains_base, keeps_base = True, False
    decays = True  # False if the method trains without weight decay
    takes_targets = False  # True if targets leave it their weights alone

    def count(self, shape: WeightShape) -> int:
        """Return 0; the report of an injection counts the model's own tensors."""
        return 0

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> DeltaWeight:
        """Raise an error: these methods have no updates."""
        raise NotImplementedError

    @abstractmethod
    def selects(self, layer: nn.Module, tensor: str) -> bool:
        """Return True if a tensor of a layer trains; ``tensor`` is its name in the layer, for example ``bias``."""

    def notes(self, model: nn.Module) -> list[str]:
        """Return notes for the report, about a model whose tensors are marked."""
        return []


class FullFineTuning(BaseWeightMethod):
    """Full fine-tuning: every tensor of the model trains (Table 8: learning rate 1e-5).

    With targets only the weights of their layers train, and no bias: those that an adapter would add to.

    Examples:
        >>> report = inject(model, FullFineTuning())
        >>> report.trainable == report.total
        True
    """

    learning_rates = (1e-5, 1e-5, 1e-5)  # Table 8
    freezes, takes_targets = False, True
    untrained = "images"  # the method of models on images that are only tested: it adds nothing to their layers

    def selects(self, layer: nn.Module, tensor: str) -> bool:
        """Return True for every tensor."""
        return True


class BitFit(BaseWeightMethod):
    """BitFit: every bias of the model trains and nothing else, without weight decay (Ben Zaken et al., 2022).

    Examples:
        >>> report = inject(model, BitFit())
        >>> all(name.endswith("bias") for name in trainable_parameters(model))
        True
    """

    learning_rates = (1e-3, 1e-3, 1e-4)
    decays = False

    def selects(self, layer: nn.Module, tensor: str) -> bool:
        """Return True for tensors whose name ends in ``bias``, such as ``in_proj_bias``."""
        return tensor.endswith("bias")


class Frozen(BaseWeightMethod):
    """No update: the model stays as it is, for tasks with learned prompts.

    Examples:
        >>> inject(model, Frozen()).trainable
        0
    """

    learning_rates = (1e-3, 1e-3, 1e-4)  # nothing trains, or a head alone
    keeps_base, updates = True, False
    rate_option = "prompt_learning_rate"

    def selects(self, layer: nn.Module, tensor: str) -> bool:
        """Return False for every tensor."""
        return False


class LinearProbe(Frozen):
    """Linear probe: the model stays frozen, only the classification head trains.

    Examples:
        >>> inject(model, LinearProbe(), trained=["head"]).trainable
        650
    """

    rate_option = "head_learning_rate"


GROWTH = 1.01
"""Largest growth of the norm of Fira's second term from one step to the next (arXiv 2410.01623)."""


class ProjectedAdamW(torch.optim.Optimizer):
    """AdamW that projects the gradient of chosen matrices before it averages (GaLore, arXiv 2403.03507; Fira).

    In the notation of both papers, for a gradient G (m, n) with m <= n, transposed if it has more rows than columns:

    - P (m, r): the r leading left singular vectors of G, at the first step and then every ``period`` steps.
    - R = P^T G, and N = Adam(R): its moments are r x n.
    - W -= lr * scale * (P N + S), with S = 0 for GaLore.
    - Fira: S = phi o (G - P R), and phi = ||N|| / ||R|| per column. ||S|| is at most ``GROWTH`` times its norm at the
      step before.

    All other parameters have AdamW's update. Weight decay is decoupled: W -= lr * decay * W.

    Examples:
        >>> report = inject(model, GaLore(rank=4))
        >>> optimizer = make_optimizer(model, lr=1e-3)
        >>> type(optimizer).__name__
        'ProjectedAdamW'
        >>> model(images).square().mean().backward()
        >>> optimizer.step()

    Args:
        params: Parameters or groups, as for every optimizer.
        projected: Matrices to project, among these parameters. Tensors of more dimensions are matrices (out, rest).
        rank: Number of vectors in P, cut to a matrix's smaller side.
        scale: Factor of the update of projected matrices.
        period: Optimizer steps between two computations of P.
        full_rank: If True, add Fira's second term, the part of the gradient outside the subspace.
        lr: Learning rate.
        betas: Decays of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of the weights.
    """

    def __init__(
        self,
        params: Any,
        projected: Collection[nn.Parameter] = (),
        *,
        rank: int = 128,
        scale: float = 0.25,
        period: int = 200,
        full_rank: bool = False,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        own = {"rank": rank, "scale": scale, "period": period, "full_rank": full_rank, "projected": []}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **own})
        chosen = {id(parameter) for parameter in projected}
        for group in self.param_groups:  # positions, which a state dict can store
            group["projected"] = [place for place, each in enumerate(group["params"]) if id(each) in chosen]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one optimizer step, and return the closure's loss.

        Raises:
            UserError: A gradient from which P is computed is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            projected = set(group["projected"])
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state.setdefault("step", 0)
                gradient = parameter.grad.to(torch.promote_types(parameter.grad.dtype, torch.float32))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                change = (_step_projected if place in projected else _adam)(state, gradient, group)
                if change is not None:
                    parameter.sub_(change, alpha=group["lr"])
                state["step"] += 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, with the dtypes that it has: PyTorch casts moments to the dtype of the weights."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][name] = value.to(parameter.device) if isinstance(value, Tensor) else value


def _adam(state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
    """Update the moments of a gradient, and return Adam's step for a learning rate of 1, with bias correction."""
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    first, second, (beta1, beta2) = state["exp_avg"], state["exp_avg_sq"], group["betas"]
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    count = state["step"] + 1
    root = second.sqrt().div_(math.sqrt(1 - beta2**count)).add_(group["eps"])
    step: Tensor = first.div(1 - beta1**count).div_(root)
    return step


def _step_projected(state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor | None:
    """Return the step of a projected weight, in its shape; None until its gradient is not zero."""
    matrix = gradient.flatten(1)
    transposed = matrix.shape[0] > matrix.shape[1]
    matrix = matrix.T if transposed else matrix
    if "projection" not in state or state["step"] % group["period"] == 0:
        has_values = not matrix.is_meta and type(matrix) is Tensor
        size = float(torch.linalg.vector_norm(matrix)) if has_values else 1.0
        if not math.isfinite(size):
            raise UserError(
                f"the gradient of a weight ({' x '.join(map(str, matrix.shape))}) is not finite (NaN or infinity) in "
                f"optimizer step {state['step'] + 1}, where its subspace is computed. Lower the learning rate, or clip "
                "gradients."
            )
        if size > 0:  # a zero gradient has arbitrary singular vectors, which would stay for a whole period
            state["projection"] = leading_vectors(matrix, group["rank"])
    if "projection" not in state:
        return None
    basis: Tensor = state["projection"]
    low = basis.T @ matrix
    normed = _adam(state, low, group)
    change = basis @ normed
    if group["full_rank"]:
        change += _outside(state, matrix - basis @ low, matrix, low, normed)
    change = change.T if transposed else change
    return change.mul_(group["scale"]).reshape(gradient.shape)


def leading_vectors(matrix: Tensor, rank: int) -> Tensor:
    """Return the leading left singular vectors (m, r) of a matrix (m, n), m <= n, in its dtype.

    They are eigenvectors of the float64 Gram matrix, which costs less than the SVD. The entry of largest magnitude of
    each is positive, so that signs do not depend on the library.
    """
    device = torch.device("cpu") if matrix.device.type == "mps" else matrix.device  # which has no float64
    wide = matrix.to(device, torch.float64)
    _, vectors = torch.linalg.eigh(wide @ wide.T)  # in ascending order
    leading = vectors[:, -min(rank, len(matrix)) :].flip(1)
    signed: Tensor = leading * signs_of(leading)
    return signed.to(matrix.device, matrix.dtype).contiguous()


def _outside(state: dict[str, Any], rest: Tensor, matrix: Tensor, low: Tensor, normed: Tensor) -> Tensor:
    """Return Fira's S (m, n) from the part of the gradient outside the subspace, and store its norm for the limit.

    A part at the level of rounding is zero and leaves the limit alone. Otherwise, the first gradients of a rank below
    ``rank`` would limit all later ones to rounding errors, growing by 1 % per step.
    """
    columns = torch.linalg.vector_norm(low, dim=0)
    factors = torch.linalg.vector_norm(normed, dim=0) / columns
    part: Tensor = rest * torch.where(columns > 0, factors, 0)
    norm, before = torch.linalg.vector_norm(part), state.get("outside_norm")
    before = torch.zeros_like(norm) if before is None else before
    # Below this, G - P R is rounding: TF32 products have errors of this size.
    counts = torch.linalg.vector_norm(rest) > 1e-3 * torch.linalg.vector_norm(matrix)
    limited = torch.where(before > 0, torch.minimum(norm, GROWTH * before), norm)
    state["outside_norm"] = torch.where(counts & (norm > 0), limited, before)
    outside: Tensor = part * torch.where(counts & (norm > 0), limited / norm, 0)
    return outside


class GaLore(FullFineTuning):
    """GaLore: every tensor trains, and AdamW's moments of matrices are projected (Zhao et al., 2024).

    Weights of linear, attention and convolution layers are projected. Vectors, embeddings, language heads, tensors of
    ``trained``, and weights that are not in a layer have AdamW's update. See `ProjectedAdamW`.

    Examples:
        >>> report = inject(model, GaLore(rank=4))
        >>> optimizer = make_optimizer(model, lr=1e-3)  # in a training loop of your own
    """

    rank: Count = 128
    """Rank of the projection, which sets the memory of the moments. It is not the rank of the update."""
    scale: Annotated[float, Positive] = 0.25
    """Factor of the update of projected weights."""
    period: Count = 200
    """Optimizer steps between two computations of the projection."""

    learning_rates = (3e-5, 3e-5, 3e-5)  # its released script for GLUE
    group = "optimizer"
    own_optimizer = True
    size_option = ""  # the rank is not the size of the update: everything trains
    full_rank = False

    def optimizer(self, model: nn.Module, groups: Any, *, fused: bool = False, **options: Any) -> torch.optim.Optimizer:
        """Return `ProjectedAdamW`, which has no fused kernel."""
        options |= {"rank": self.rank, "scale": self.scale, "period": self.period, "full_rank": self.full_rank}
        return ProjectedAdamW(groups, projected_weights(model).values(), **options)

    def optimizer_numbers(self, model: nn.Module) -> int:
        """Return the numbers of the optimizer's state: projections, projected moments, and AdamW's two."""
        projected = projected_weights(model)
        chosen = {id(weight) for weight in projected.values()}
        total = 2 * sum(each.numel() for each in model.parameters() if each.requires_grad and id(each) not in chosen)
        for weight in projected.values():
            small, large = sorted((len(weight), weight[0].numel()))
            total += min(self.rank, small) * (small + 2 * large) + self.full_rank  # P, two moments, and Fira's norm
        return total

    def notes(self, model: nn.Module) -> list[str]:
        """Return what is projected, for the report of an injection."""
        weights = projected_weights(model)
        cut = sum(min(each.shape[0], each[0].numel()) < self.rank for each in weights.values())
        note = f"moments of {len(weights)} weights are projected to rank {self.rank}"
        return [note + (f", cut to the smaller side in {cut} of them" if cut else "")]


class Fira(GaLore):
    """Fira: GaLore and the rest of the gradient, scaled as Adam scales the projected part (Chen et al., 2024).

    The update of a projected weight has full rank at every step, with the memory of GaLore. See `ProjectedAdamW`.

    Examples:
        >>> report = inject(model, Fira(rank=4))
        >>> optimizer = make_optimizer(model, lr=1e-3)  # in a training loop of your own
    """

    scale: Annotated[float, Positive] = 1.0
    """Factor of the update of projected weights."""

    learning_rates = (1e-4, 1e-4, 1e-4)  # its released script for commonsense, with scale 1
    full_rank = True


def projected_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable weights of layers, by name, without embeddings, language head and ``trained`` tensors."""
    beside = {row.layer for row in getattr(getattr(model, "adapter_report", None), "beside", ())}
    aside = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    aside |= {id(getattr(head, "weight", None))}
    weights: dict[str, nn.Parameter] = {}
    for name in dict.fromkeys(weight_key(model, site) for site in find_sites(model)):
        weight = model.get_parameter(name)
        if weight.requires_grad and id(weight) not in aside and name not in beside:
            weights[name] = weight
            aside.add(id(weight))  # a shared weight once
    return weights
