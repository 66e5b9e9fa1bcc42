"""The methods that are measured beside each other, our own and PEFT's, on the very same layers."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from randlora_pl.adapters import Adapter, DoRA, FullFineTuning, LoRA, NoLA, RandLoRA, VeRA, inject
from randlora_pl.adapters.targets import select
from randlora_pl.errors import UserError, near

LORA_RANK, RANDLORA_RANK, VERA_RANK = 32, 6, 256
Targets = list[str] | None
"""What to adapt, as everywhere; None is the paper's choice where the model has it, else every linear layer."""


class UnavailableError(Exception):
    """Why a method cannot be measured here; it is told in its row, and the others go on."""


@dataclass(frozen=True)
class Method:
    """A method as the bench knows it.

    Attributes:
        label: What tables call it, with ``{}`` for the rank.
        adapt: Puts it into a model: (model, targets, rank).
        rank: Its rank where none is given.
        peer: Name of PEFT's counterpart, empty where there is none.
        foreign: Whether it is PEFT's.
        default: Whether it is measured where none is named.
    """

    label: str
    adapt: Callable[[nn.Module, Targets, int], None]
    rank: int = 0
    peer: str = ""
    foreign: bool = False
    default: bool = True


def _ours(make: Callable[[int], Adapter]) -> Callable[[nn.Module, Targets, int], None]:
    def adapt(model: nn.Module, targets: Targets, rank: int) -> None:
        try:
            adapter = make(rank)
        except UserError as error:
            raise UnavailableError("not in this version") from error
        try:
            inject(model, adapter, None if adapter.trains_base else targets)
        except UserError as error:
            raise UnavailableError(str(error)) from error

    return adapt


def _pefts(make: Callable[[Any, int, list[str]], Any]) -> Callable[[nn.Module, Targets, int], None]:
    def adapt(model: nn.Module, targets: Targets, rank: int) -> None:
        layers = layers_of(model, targets)
        try:
            peft: Any = import_module("peft")
            tuners: Any = import_module("peft.tuners.tuners_utils")
        except ImportError as error:
            raise UnavailableError("peft is not installed: pip install peft") from error
        if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
            raise UnavailableError("PEFT cannot wrap this attention; measure a timm model")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.get_peft_model(model, make(peft, rank, layers))  # in place; VeRA's shared tensors need it
        wrapped = [name for name, module in model.named_modules() if isinstance(module, tuners.BaseTunerLayer)]
        if wrapped != layers:
            raise UnavailableError(f"PEFT adapted {len(wrapped)} other layers than the {len(layers)}")

    return adapt


METHODS = {
    "full": Method("full fine-tuning", _ours(lambda _: FullFineTuning())),
    "lora": Method("LoRA-{}", _ours(lambda rank: LoRA(rank=rank)), LORA_RANK, "peft-lora"),
    "randlora": Method("RandLoRA-{}", _ours(lambda rank: RandLoRA(rank=rank)), RANDLORA_RANK, "peft-randlora"),
    "randlora-hadamard": Method(
        "RandLoRA-{}, hadamard",
        _ours(lambda rank: RandLoRA(rank=rank, basis="hadamard")),
        RANDLORA_RANK,
        "peft-randlora",
    ),
    "randlora-ternary": Method(
        "RandLoRA-{}, ternary", _ours(lambda rank: RandLoRA(rank=rank, basis="ternary")), RANDLORA_RANK, "peft-randlora"
    ),
    "randlora-low": Method(
        "RandLoRA-{}, memory low",
        _ours(lambda rank: RandLoRA(rank=rank, memory="low")),
        RANDLORA_RANK,
        "peft-randlora",
        default=False,
    ),
    "dora": Method("DoRA-{}", _ours(lambda rank: DoRA(LoRA(rank=rank))), LORA_RANK, "peft-dora", default=False),
    "vera": Method("VeRA-{}", _ours(lambda rank: VeRA(rank=rank)), VERA_RANK, "peft-vera", default=False),
    "nola": Method("NoLA", _ours(lambda _: NoLA()), default=False),
    "peft-lora": Method(
        "PEFT LoRA-{}",
        _pefts(lambda peft, rank, layers: peft.LoraConfig(r=rank, lora_dropout=0.0, target_modules=layers)),
        LORA_RANK,
        foreign=True,
    ),
    "peft-dora": Method(
        "PEFT DoRA-{}",
        _pefts(
            lambda peft, rank, layers: peft.LoraConfig(r=rank, lora_dropout=0.0, use_dora=True, target_modules=layers)
        ),
        LORA_RANK,
        foreign=True,
        default=False,
    ),
    "peft-vera": Method(
        "PEFT VeRA-{}",
        _pefts(lambda peft, rank, layers: peft.VeraConfig(r=rank, vera_dropout=0.0, target_modules=layers)),
        VERA_RANK,
        foreign=True,
        default=False,
    ),
    "peft-randlora": Method(
        "PEFT RandLoRA-{}",
        _pefts(
            lambda peft, rank, layers: peft.RandLoraConfig(
                r=rank, randlora_alpha=10, randlora_dropout=0.0, target_modules=layers
            )
        ),
        RANDLORA_RANK,
        foreign=True,
    ),
}


def chosen(names: list[str] | None) -> list[str]:
    """The methods to measure, in the order of the table; those of the paper's comparison by default.

    Raises:
        UserError: There is no such method.
    """
    for name in names or ():
        if name not in METHODS:
            raise UserError(f"--methods: there is no {name!r}.{near(name, METHODS)} Known: {' '.join(METHODS)}")
    return [name for name, method in METHODS.items() if (method.default if names is None else name in names)]


def layers_of(base: nn.Module, targets: Targets = None) -> list[str]:
    """Names of the layers that every method adapts.

    Raises:
        UserError: A target matches none, or the model has none that an adapter can attach to.
    """
    return [site.shape.layer for site in select(base, targets, split=False)]


def adapted(base: nn.Module, name: str, rank: int | None = None, targets: Targets = None) -> nn.Module:
    """A copy of a plain model with a method in it; methods that freeze the model's tensors share them with it.

    So a model of any size is in memory twice, whatever the number of methods: once frozen, once trained.

    Args:
        base: The plain model; it is frozen on the way.
        name: A name of `METHODS`.
        rank: Another rank than the method's own.
        targets: The layers to adapt.

    Raises:
        UnavailableError: The method cannot be had here; says why.
    """
    method = METHODS[name]
    shared: dict[int, Any] = {} if name == "full" else {id(parameter): parameter for parameter in base.parameters()}
    model = copy.deepcopy(base, shared)
    method.adapt(model, targets, rank or method.rank)
    return model


def label(name: str, rank: int | None = None) -> str:
    """What tables call a method."""
    return METHODS[name].label.format(rank or METHODS[name].rank)
