"""The methods that are measured beside each other, our own and PEFT's, on the very same layers."""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from torch import nn

from randlora_pl.adapters import (
    OFT,
    PRANC,
    SVFT,
    AdaLoRA,
    Adapter,
    DoRA,
    FullFineTuning,
    HiRA,
    HydraLoRA,
    KRAdapter,
    LoRA,
    LoRAXS,
    NoLA,
    PiSSA,
    RandLoRA,
    SHiRA,
    VeRA,
    inject,
)
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.adapters.targets.select import select
from randlora_pl.lab.bench.costs import OUT_OF_MEMORY, is_out_of_memory
from randlora_pl.utils.errors import UserError, near

LORA_RANK, RANDLORA_RANK, VERA_RANK = 32, 6, 256
LANGUAGE_RANKS = {"lora": 16, "dora": 16, "randlora": 10, "vera": 1024}
"""Ranks for decoders (Tables 9 and 15 of the paper), ours and PEFT's; the others are for images (Table 8)."""
Targets = list[str] | None
"""What to adapt, as everywhere; None is the paper's choice where the model has it, else every linear layer."""


Adapt = Callable[[nn.Module, Targets, int, float], None]


class UnavailableError(Exception):
    """Error for a method that cannot be measured here; its row shows the reason, and the others continue."""


@dataclass(frozen=True)
class Method:
    """A method as the bench knows it.

    Attributes:
        label: Name in tables, with ``{}`` for the rank.
        adapt: Puts it into a model: (model, targets, rank, dropout).
        peer: Name of PEFT's counterpart, empty where there is none.
        foreign: Whether it is PEFT's.
        default: Whether it is measured where none is named.
    """

    label: str
    adapt: Adapt
    rank: int = 0
    peer: str = ""
    foreign: bool = False
    default: bool = True


def _ours(make: Callable[..., Adapter], **options: Any) -> Adapt:
    """Return one of this program's methods: its class, or a function that makes it from ``rank`` and ``dropout``."""

    def adapt(model: nn.Module, targets: Targets, rank: int, dropout: float) -> None:
        try:
            adapter = make(rank=rank, dropout=dropout, **options)
            inject(model, adapter, None if adapter.trains_base else targets)
        except UserError as error:
            raise UnavailableError(str(error)) from error

    return adapt


def _unranked(method: type[Adapter]) -> Callable[..., Adapter]:
    """Return a function that makes a method without an option ``rank`` and drops the rank."""
    return lambda rank, **options: method(**options)


def ternary(sparsity: int | Literal["sqrt"] = 6, dense: bool = False) -> Adapt:
    """Return RandLoRA with ternary bases; ``dense`` takes dense products also where additions are faster."""
    sparse = _ours(RandLoRA, basis="ternary", sparsity=sparsity)

    def adapt(model: nn.Module, targets: Targets, rank: int, dropout: float) -> None:
        sparse(model, targets, rank, dropout)
        for bases in model.modules() if dense else ():
            if isinstance(bases, Bases):
                bases.B = bases.B.float()  # without the 8 bits by which ternary entries are known

    return adapt


def _pefts(kind: str, **options: Any) -> Adapt:
    def adapt(model: nn.Module, targets: Targets, rank: int, dropout: float) -> None:
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
            given = options | {"r": rank, "target_modules": layers, f"{kind.lower()}_dropout": dropout}
            config = getattr(peft, f"{kind}Config")(**given)
            peft.get_peft_model(model, config)  # in place; VeRA's shared tensors need it
        wrapped = [name for name, module in model.named_modules() if isinstance(module, tuners.BaseTunerLayer)]
        if wrapped != layers:
            raise UnavailableError(f"PEFT adapted {len(wrapped)} other layers than the {len(layers)}")

    return adapt


_RANDLORA = (RANDLORA_RANK, "peft-randlora")
METHODS = {
    "full": Method("full fine-tuning", _ours(lambda **_: FullFineTuning())),
    "lora": Method("LoRA-{}", _ours(LoRA), LORA_RANK, "peft-lora"),
    "randlora": Method("RandLoRA-{}", _ours(RandLoRA), *_RANDLORA),
    "randlora-hadamard": Method("RandLoRA-{}, hadamard", _ours(RandLoRA, basis="hadamard"), *_RANDLORA),
    "randlora-ternary": Method("RandLoRA-{}, ternary", _ours(RandLoRA, basis="ternary"), *_RANDLORA),
    "randlora-ternary-dense": Method(
        "RandLoRA-{}, ternary, dense products", ternary(dense=True), *_RANDLORA, default=False
    ),
    "randlora-low": Method("RandLoRA-{}, memory low", _ours(RandLoRA, memory="low"), *_RANDLORA, default=False),
    "dora": Method("DoRA-{}", _ours(lambda **options: DoRA(LoRA(**options))), LORA_RANK, "peft-dora", default=False),
    "vera": Method("VeRA-{}", _ours(VeRA), VERA_RANK, "peft-vera", default=False),
    "nola": Method("NoLA", _ours(_unranked(NoLA)), default=False),
    "adalora": Method("AdaLoRA-{}", _ours(AdaLoRA), 48, default=False),
    "pissa": Method("PiSSA-{}", _ours(PiSSA), LORA_RANK, default=False),
    "loraxs": Method("LoRA-XS-{}", _ours(LoRAXS), 64, default=False),
    "hydralora": Method("HydraLoRA-{}", _ours(HydraLoRA), 8, default=False),
    "hira": Method("HiRA-{}", _ours(HiRA), LORA_RANK, default=False),
    "shira": Method("SHiRA-{}", _ours(SHiRA), LORA_RANK, default=False),
    "kradapter": Method("KRAdapter", _ours(_unranked(KRAdapter)), default=False),
    "oft": Method("OFT", _ours(_unranked(OFT)), default=False),
    "svft": Method("SVFT, banded", _ours(_unranked(SVFT)), default=False),
    "pranc": Method("PRANC", _ours(_unranked(PRANC)), default=False),
    "peft-lora": Method("PEFT LoRA-{}", _pefts("Lora"), LORA_RANK, foreign=True),
    "peft-dora": Method("PEFT DoRA-{}", _pefts("Lora", use_dora=True), LORA_RANK, foreign=True, default=False),
    "peft-vera": Method("PEFT VeRA-{}", _pefts("Vera"), VERA_RANK, foreign=True, default=False),
    "peft-randlora": Method("PEFT RandLoRA-{}", _pefts("RandLora", randlora_alpha=10), RANDLORA_RANK, foreign=True),
}


def chosen(names: Sequence[str]) -> list[str]:
    """Return the methods to measure, in the order of the table, by default the ones that the paper compares.

    Raises:
        UserError: A method is unknown.
    """
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods: unknown {name!r}.{near(name, METHODS)} Known: {' '.join(METHODS)}")
    return [name for name, method in METHODS.items() if (name in names if names else method.default)]


def layers_of(base: nn.Module, targets: Targets = None) -> list[str]:
    """Return the names of the layers that every method adapts.

    Raises:
        UserError: A target matches none, or the model has none that an adapter can attach to.
    """
    return [site.shape.layer for site in select(base, targets, split=False)]


def adapted(
    base: nn.Module,
    name: str,
    rank: int | None = None,
    targets: Targets = None,
    dropout: float = 0.0,
    adapt: Adapt | None = None,
) -> nn.Module:
    """Return a copy of a plain model with a method in it; methods that freeze the model's tensors share them with it.

    So a model of any size is in memory twice, whatever the number of methods: once frozen, once trained. The plain
    model is frozen on the way.

    Raises:
        UnavailableError: The method is not available here, or there is not the memory for it.
    """
    method = METHODS[name]
    shared: dict[int, Any] = {} if name == "full" else {id(parameter): parameter for parameter in base.parameters()}
    try:
        model = copy.deepcopy(base, shared)
        (adapt or method.adapt)(model, targets, rank or method.rank, dropout)
    except Exception as error:
        if is_out_of_memory(error):
            raise UnavailableError(OUT_OF_MEMORY) from error
        raise
    return model


def label(name: str, rank: int | None = None) -> str:
    """Return a method's name in tables."""
    return METHODS[name].label.format(rank or METHODS[name].rank)
