"""Layers that build W0 + delta once at every use: convolutions, and linear layers whose weight a module above reads."""

from typing import ClassVar

from torch import Tensor, nn

from randlora_pl.adapters.base import DeltaWeight, like
from randlora_pl.adapters.layers.adapted import AdaptedLayer, unsharded
from randlora_pl.adapters.targets.obstacles import reader_of
from randlora_pl.utils.errors import UserError


class BuiltWeight(AdaptedLayer):
    """An adapted layer whose weight acts as a whole, in the shape in which it is stored."""

    weight_name: ClassVar[str] = "weight"

    def acting_weight(self) -> Tensor:
        """The weight that acts now: adapted, or frozen where the update is disabled."""
        if not self.enabled:
            return unsharded(self.adapted_weight if self.frozen_weight is None else self.frozen_weight)
        if self.delta is None or self.merged:
            return self.adapted_weight
        return self.swap_layout(self.delta.effective_weight(self.swap_layout(unsharded(self.adapted_weight))))


class AdaptedConv2d(BuiltWeight, nn.Conv2d):
    """``nn.Conv2d`` or a subclass with an update of its weight (out, in / groups, height, width).

    The update is a matrix (out, in / groups * height * width). With dropout, the update convolves the input that is
    left, beside the frozen convolution of the whole input. A subclass with a forward of its own is called with the
    built weight in place of its own one.
    """

    def swap_layout(self, matrix: Tensor) -> Tensor:
        """From four dimensions to (out, in), and back."""
        return matrix.view(self.adapted_weight.shape) if matrix.dim() == 2 else matrix.flatten(1)

    def forward(self, input: Tensor) -> Tensor:
        """(n, in, height, width) to (n, out, height', width')."""
        if self.delta is None or not self.enabled or self.merged or not drops(self.delta):
            return self._convolved(input, self.acting_weight(), self.bias)
        plain = self._convolved(input, self.adapted_weight, self.bias)
        weight = self.base_weight

        def product(x: Tensor, change: Tensor) -> Tensor:
            return self._convolved(x, self.swap_layout(like(change, x)), None)

        return plain + like(self.delta.apart(input, weight, product), plain)

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
    """``nn.Linear`` with an update, for modules that read its weight: ``layer.weight`` is W0 + delta.

    The state dict has W0 as ever, since parameters are stored by name.
    """

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight that acts now, (out, in)."""
        return self.acting_weight()


def has_own_forward(kind: type[nn.Module]) -> bool:
    """Return True if a class of convolutions does more than ``nn.Conv2d``."""
    own = (getattr(kind, name) is not getattr(nn.Conv2d, name) for name in ("forward", "_conv_forward"))
    return issubclass(kind, nn.Conv2d) and any(own)


def drops(delta: DeltaWeight) -> bool:
    """Return True if an update, or a part of it, drops inputs now."""
    return any(isinstance(module, DeltaWeight) and module.drops for module in delta.modules())


def check_dropout_acts(model: nn.Module, path: str, delta: DeltaWeight) -> None:
    """Refuses dropout where an update has no input of its own.

    Raises:
        UserError: The layer's weight is read by another module, or a convolution computes another one from it.
    """
    if not any(isinstance(module, DeltaWeight) and module.dropout for module in delta.modules()):
        return
    kind = type(model.get_submodule(path))
    why = f"{kind.__name__} has a forward of its own" if has_own_forward(kind) else ""
    if issubclass(kind, nn.Linear) and (reader := reader_of(model, path)) is not None:
        why = f"{reader.__name__} reads its weight"
    if why:
        raise UserError(f"{path}: {why}, so its update has no input to drop: set dropout to 0, or leave the layer out.")
