"""The methods that are measured beside each other, our own and PEFT's, on the very same layers."""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from torch import nn

from randlora_pl import adapters
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.adapters.select import select
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
    default: bool = False


def _ours(make: Callable[..., adapters.Adapter], **options: Any) -> Adapt:
    """Return one of this program's methods: its class, or a function that makes it from ``rank`` and ``dropout``."""

    def adapt(model: nn.Module, targets: Targets, rank: int, dropout: float) -> None:
        try:
            adapter = make(rank=rank, dropout=dropout, **options)
            adapters.inject(model, adapter, None if adapter.trains_base else targets)
        except UserError as error:
            raise UnavailableError(str(error)) from error

    return adapt


def _unranked(method: type[adapters.Adapter]) -> Callable[..., adapters.Adapter]:
    """Return a function that makes a method without an option ``rank`` and drops the rank."""
    return lambda rank, **options: method(**options)


def ternary(sparsity: int | Literal["sqrt"] = 6, dense: bool = False) -> Adapt:
    """Return RandLoRA with ternary bases; ``dense`` takes dense products also where additions are faster."""
    sparse = _ours(adapters.RandLoRA, basis="ternary", sparsity=sparsity)

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
    "full": Method("full fine-tuning", _ours(lambda **_: adapters.FullFineTuning()), default=True),
    "lora": Method("LoRA-{}", _ours(adapters.LoRA), LORA_RANK, "peft-lora", default=True),
    "randlora": Method("RandLoRA-{}", _ours(adapters.RandLoRA), *_RANDLORA, default=True),
    "randlora-hadamard": Method(
        "RandLoRA-{}, hadamard", _ours(adapters.RandLoRA, basis="hadamard"), *_RANDLORA, default=True
    ),
    "randlora-ternary": Method(
        "RandLoRA-{}, ternary", _ours(adapters.RandLoRA, basis="ternary"), *_RANDLORA, default=True
    ),
    "randlora-ternary-dense": Method("RandLoRA-{}, ternary, dense products", ternary(dense=True), *_RANDLORA),
    "randlora-low": Method("RandLoRA-{}, memory low", _ours(adapters.RandLoRA, memory="low"), *_RANDLORA),
    "dora": Method("DoRA-{}", _ours(lambda **given: adapters.DoRA(adapters.LoRA(**given))), LORA_RANK, "peft-dora"),
    "vera": Method("VeRA-{}", _ours(adapters.VeRA), VERA_RANK, "peft-vera"),
    "nola": Method("NoLA", _ours(_unranked(adapters.NoLA))),
    "adalora": Method("AdaLoRA-{}", _ours(adapters.AdaLoRA), 48),
    "pissa": Method("PiSSA-{}", _ours(adapters.PiSSA), LORA_RANK),
    "loraxs": Method("LoRA-XS-{}", _ours(adapters.LoRAXS), 64),
    "hydralora": Method("HydraLoRA-{}", _ours(adapters.HydraLoRA), 8),
    "hira": Method("HiRA-{}", _ours(adapters.HiRA), LORA_RANK),
    "shira": Method("SHiRA-{}", _ours(adapters.SHiRA), LORA_RANK),
    "kradapter": Method("KRAdapter", _ours(_unranked(adapters.KRAdapter))),
    "oft": Method("OFT", _ours(_unranked(adapters.OFT))),
    "svft": Method("SVFT, banded", _ours(_unranked(adapters.SVFT))),
    "pranc": Method("PRANC", _ours(_unranked(adapters.PRANC))),
    "peft-lora": Method("PEFT LoRA-{}", _pefts("Lora"), LORA_RANK, foreign=True, default=True),
    "peft-dora": Method("PEFT DoRA-{}", _pefts("Lora", use_dora=True), LORA_RANK, foreign=True),
    "peft-vera": Method("PEFT VeRA-{}", _pefts("Vera"), VERA_RANK, foreign=True),
    "peft-randlora": Method(
        "PEFT RandLoRA-{}", _pefts("RandLora", randlora_alpha=10), RANDLORA_RANK, foreign=True, default=True
    ),
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
