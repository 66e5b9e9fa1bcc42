"""Methods, one file each, imported together, so that parsers find them all; methods of others are registered here."""

import json
from typing import TypeVar

from randlora_pl.adapters.base import Adapter
from randlora_pl.adapters.described import make
from randlora_pl.adapters.methods.adalora import AdaLoRA
from randlora_pl.adapters.methods.autolora import AutoLoRA
from randlora_pl.adapters.methods.dora import DoRA
from randlora_pl.adapters.methods.full import BitFit, Frozen, FullFineTuning, LinearProbe
from randlora_pl.adapters.methods.galore import Fira, GaLore
from randlora_pl.adapters.methods.hira import HiRA
from randlora_pl.adapters.methods.hydralora import HydraLoRA
from randlora_pl.adapters.methods.kradapter import KRAdapter
from randlora_pl.adapters.methods.lora import LoRA
from randlora_pl.adapters.methods.loraxs import LoRAXS
from randlora_pl.adapters.methods.nola import NoLA
from randlora_pl.adapters.methods.oft import OFT
from randlora_pl.adapters.methods.pissa import PiSSA
from randlora_pl.adapters.methods.pranc import PRANC
from randlora_pl.adapters.methods.randlora import RandLoRA
from randlora_pl.adapters.methods.shira import SHiRA
from randlora_pl.adapters.methods.svft import SVFT
from randlora_pl.adapters.methods.together import Together
from randlora_pl.adapters.methods.vera import VeRA
from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.own_classes import METHODS, check_importable, is_own, path_of

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


def check_loads_again(adapter: Adapter) -> None:
    """Refuse an adapter whose file could not be loaded again.

    Raises:
        UserError: A class cannot be imported, or its options do not give the same adapter again.
    """
    kinds = _kinds(adapter)
    if not any(map(is_own, kinds)):
        return
    for kind in kinds:
        if is_own(kind):
            check_importable(kind)
    name, described = adapter.method(), adapter.describe()
    try:
        text = json.dumps(described)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: options that a file cannot hold ({error}). Use numbers, texts and lists.") from None
    again = make({path_of(kind): kind for kind in kinds}, json.loads(text), f"{name}, made again from its options")
    if json.dumps(again.describe()) != text:
        raise UserError(
            f"{name} is another adapter when it is made again from its options, {brief(described['options'])}. "
            "Keep each option as it was given."
        )


def _kinds(adapter: Adapter) -> set[type[Adapter]]:
    """Return the classes of an adapter and of the adapters inside it."""
    return {type(adapter)}.union(*map(_kinds, adapter.nested()))
