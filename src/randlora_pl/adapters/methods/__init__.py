"""Methods, a file for each or for a family of them, imported together, so that parsers find them all.

Methods of others are registered here.
"""

from typing import TypeVar

from randlora_pl.adapters.base import Adapter
from randlora_pl.adapters.methods.adalora import AdaLoRA
from randlora_pl.adapters.methods.autolora import AutoLoRA
from randlora_pl.adapters.methods.full import BitFit, Fira, Frozen, FullFineTuning, GaLore, LinearProbe
from randlora_pl.adapters.methods.kradapter import KRAdapter
from randlora_pl.adapters.methods.lora import HydraLoRA, LoRA
from randlora_pl.adapters.methods.multiplied import OFT, HiRA
from randlora_pl.adapters.methods.nested import DoRA, Together
from randlora_pl.adapters.methods.randlora import RandLoRA
from randlora_pl.adapters.methods.random_matrices import PRANC, NoLA, VeRA
from randlora_pl.adapters.methods.shira import SHiRA
from randlora_pl.adapters.methods.singular import SVFT, LoRAXS, PiSSA
from randlora_pl.utils.own_classes import METHODS

__all__ = [
    "OFT",
    "PRANC",
    "SVFT",
    "AdaLoRA",
    "AutoLoRA",
    "BitFit",
    "DoRA",
    "Fira",
    "Frozen",
    "FullFineTuning",
    "GaLore",
    "HiRA",
    "HydraLoRA",
    "KRAdapter",
    "LinearProbe",
    "LoRA",
    "LoRAXS",
    "NoLA",
    "PiSSA",
    "RandLoRA",
    "SHiRA",
    "Together",
    "VeRA",
]

Method = TypeVar("Method", bound=type[Adapter])


def register(kind: Method) -> Method:
    """Make a method of your own loadable from adapter files, which store its import path; also as a decorator.

    ``--import MODULE`` and the entry-point group ``randlora_pl.adapters`` do the same for commands.

    Examples:
        >>> from randlora_pl.adapters import LoRA, register
        >>> @register
        ... class DoubledLoRA(LoRA):
        ...     def delta_weight(self, shape, weight, bases):
        ...         return super().delta_weight(shape, 2 * weight, bases)

    Args:
        kind: A subclass of `Adapter`.

    Returns:
        The same class.

    Raises:
        UserError: It is not a subclass of `Adapter`, or has the name of a method of this program.
    """
    METHODS.register(kind, Adapter, __all__)  # type: ignore[type-abstract]
    return kind
