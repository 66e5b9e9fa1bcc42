"""Layers that build W0 + delta at every use: convolutions, and linear layers whose weight a parent module reads."""

from typing import ClassVar

from torch import Tensor, nn

from randlora_pl.adapters.base import DeltaWeight, like
from randlora_pl.adapters.layers.adapted import AdaptedLayer, unsharded
from randlora_pl.adapters.targets.obstacles import reader_of
from randlora_pl.utils.errors import UserError


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
