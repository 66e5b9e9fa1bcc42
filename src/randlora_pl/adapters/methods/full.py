"""Methods that train a model's own tensors: full fine-tuning, BitFit and the linear probe."""

from abc import abstractmethod
from dataclasses import field
from typing import Any

from torch import Tensor, nn

from randlora_pl.adapters.base import Adapter, DeltaWeight
from randlora_pl.adapters.random_bases import Bases, WeightShape


class BaseWeightMethod(Adapter):
    """Base of methods without an update, which mark tensors of the model as trainable."""

    dropout: float = field(init=False, default=0.0)
    qkv: Any = field(init=False, default="packed")
    match: str | None = field(init=False, default=None)
    seed: int | None = field(init=False, default=None)

    group = "whole"
    trains_base, keeps_base = True, False
    decays = True  # False if the method trains without weight decay

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

    Examples:
        >>> report = inject(model, FullFineTuning())
        >>> report.trainable == report.total
        True
    """

    learning_rates = (1e-5, 1e-5, 1e-5)  # Table 8
    freezes = False
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
