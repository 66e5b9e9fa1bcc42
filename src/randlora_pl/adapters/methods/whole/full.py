"""Methods that train a model's own tensors: full fine-tuning, BitFit and the linear probe."""

from torch import nn

from randlora_pl.adapters.base import Adapter


class BaseWeightMethod(Adapter):
    """A method that adds nothing and marks tensors of the model as trainable."""

    trains_base = True

    def __init__(self) -> None:
        super().__init__()

    def selects(self, layer: nn.Module, tensor: str) -> bool:
        """Whether a tensor of a layer trains; ``tensor`` is its name in the layer, for example ``bias``."""
        raise NotImplementedError


class FullFineTuning(BaseWeightMethod):
    """Full fine-tuning: every tensor of the model trains (Table 8: learning rate 1e-5)."""

    def selects(self, layer: nn.Module, tensor: str) -> bool:
        """Every tensor."""
        return True


class BitFit(BaseWeightMethod):
    """BitFit: every bias of the model trains and nothing else (Ben Zaken et al., 2022)."""

    def selects(self, layer: nn.Module, tensor: str) -> bool:
        """Tensors called ``bias``, or ending so as ``in_proj_bias`` does."""
        return tensor.endswith("bias")


class LinearProbe(BaseWeightMethod):
    """Linear probe: the model stays frozen, only the classification head trains."""

    def selects(self, layer: nn.Module, tensor: str) -> bool:
        """No tensor of the model."""
        return False
