"""Measurements that a user can repeat: costs of a training step, and the methods that are measured side by side.

Costs are seconds, operations, tensors kept for the backward pass, allocator and resident set. Everything compared is
timed in turns, with its spread, in one run on one machine: machines are noisy, and other programs slow all cases
alike. The methods are our own and PEFT's, on the very same layers.
"""

import copy
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from randlora_pl import adapters
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.adapters.select import select
from randlora_pl.utils.errors import UserError, near, out_of_memory
from randlora_pl.utils.machine import usable_cores

OUT_OF_MEMORY = "out of memory"


@contextmanager
def saved_tensors(outside: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Count what forward passes inside the block keep for their backward passes: the bytes of each storage, once.

    An address stands for a storage, which is right until the first backward pass: up to then nothing that
    was counted is freed.

    Args:
        outside: Tensors that exist anyway and so cost nothing: parameters, buffers, the batch.
    """
    seen = {tensor.untyped_storage().data_ptr() for tensor in outside}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # a view keeps all of it alive
        if storage.data_ptr() not in seen:
            sizes.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


_LEAST = 0.2  # seconds that the products of one measurement take at least


def counter() -> FlopCounterMode:
    """Count the products of matrices, convolutions and attention inside a ``with`` block, backward passes included.

    Operations are counted as they reach the device, so that operations of custom autograd functions are in;
    element by element ones are not.
    """
    aten = torch.ops.aten

    def added(_: torch.Size, left: torch.Size, right: torch.Size, *__: Any, **___: Any) -> int:
        return 2 * math.prod(left) * right[-1]

    # the sizes are (batch, heads, length, width)
    def scores(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])  # and their product with the values

    def backward(_: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *__: Any, **___: Any) -> int:
        # the scores once more, then two products for the weights and the values and two for query and key
        return 2 * math.prod(query[:3]) * key[2] * (3 * query[3] + 2 * value[3])

    omitted = {  # by PyTorch: fused attention on CPUs, and in-place added products
        aten.addmm_: added,
        aten.baddbmm_: added,
        aten._scaled_dot_product_flash_attention_for_cpu: scores,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=omitted)


class Gemm:
    """A product of two large square matrices, whose speed stands for the peak of the machine.

    Args:
        side: Rows and columns, by default as many as the device likes.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, side: int | None = None) -> None:
        self.side = side or (8192 if device.type == "cuda" else 2048)
        self.device, self.dtype = device, dtype

    def rate(self) -> float:
        """Return the operations per second, the mean over a fifth of a second or longer."""
        matrix = torch.randn(self.side, self.side, device=self.device).to(self.dtype)  # gone before anything else runs
        result = torch.mm(matrix, matrix)
        synchronize(self.device)
        start, count = time.perf_counter(), 0
        while not count or time.perf_counter() - start < _LEAST:
            torch.mm(matrix, matrix, out=result)
            synchronize(self.device)
            count += 1
        return 2 * self.side**3 * count / (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some values."""

    median: float
    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}} .. {self.high:{spec}})"


def in_turns(
    cases: Mapping[str, Callable[[], float]],
    rounds: int,
    tick: Callable[[str], None],
    after_round: Callable[[dict[str, list[float]]], None],
) -> dict[str, list[float]]:
    """Return the measurements of each case, one per round; every round goes through all cases.

    Every other round goes backwards, so that no case always follows the same one, which leaves it caches and an
    allocator in its own state.

    Args:
        cases: Functions to measure, by name; each call returns one value.
        rounds: Measurements of each case.
        tick: Called with the name of the case that is measured next.
        after_round: Given the measurements so far after each round.
    """
    values: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds):
        order = list(cases)
        for name in order[::-1] if number % 2 else order:
            tick(name)
            values[name].append(cases[name]())
        after_round({name: list(numbers) for name, numbers in values.items()})
    return values


def ratios(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Return the spread of the ratios that the rounds give, each to the base of its own round."""
    return Spread.over([one / other for one, other in zip(values, base, strict=True)])


def machine() -> dict[str, Any]:
    """Return facts that affect timings: processor, cores this process may use, and versions."""
    facts: dict[str, Any] = {"processor": processor(), "cores": usable_cores(), "threads": torch.get_num_threads()}
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return facts | {"torch": torch.__version__} | gpu | {"python": platform.python_version()}


def processor() -> str:
    """Return the processor's name, as far as the system reports it."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 (read line by line)
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
            adapter = make(**({"rank": rank} if rank else {}), dropout=dropout, **options)
            adapters.inject(model, adapter, None if adapter.trains_base else targets)
        except UserError as error:
            raise UnavailableError(str(error)) from error

    return adapt


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
            raise UnavailableError(f"PEFT adapted {len(wrapped)} layers, which are not the {len(layers)}")

    return adapt


_RANDLORA = (RANDLORA_RANK, "peft-randlora")
_randlora = partial(_ours, adapters.RandLoRA)
METHODS = {
    "full": Method("full fine-tuning", _ours(lambda **_: adapters.FullFineTuning()), default=True),
    "lora": Method("LoRA-{}", _ours(adapters.LoRA), LORA_RANK, "peft-lora", default=True),
    "randlora": Method("RandLoRA-{}", _randlora(), *_RANDLORA, default=True),
    "randlora-hadamard": Method("RandLoRA-{}, hadamard", _randlora(basis="hadamard"), *_RANDLORA, default=True),
    "randlora-ternary": Method("RandLoRA-{}, ternary", _randlora(basis="ternary"), *_RANDLORA, default=True),
    "randlora-ternary-dense": Method("RandLoRA-{}, ternary, dense products", ternary(dense=True), *_RANDLORA),
    "randlora-low": Method("RandLoRA-{}, memory low", _randlora(memory="low"), *_RANDLORA),
    "dora": Method("DoRA-{}", _ours(lambda **given: adapters.DoRA(adapters.LoRA(**given))), LORA_RANK, "peft-dora"),
    "vera": Method("VeRA-{}", _ours(adapters.VeRA), VERA_RANK, "peft-vera"),
    "nola": Method("NoLA", _ours(adapters.NoLA)),
    "adalora": Method("AdaLoRA-{}", _ours(adapters.AdaLoRA), 48),
    "pissa": Method("PiSSA-{}", _ours(adapters.PiSSA), LORA_RANK),
    "loraxs": Method("LoRA-XS-{}", _ours(adapters.LoRAXS), 64),
    "hydralora": Method("HydraLoRA-{}", _ours(adapters.HydraLoRA), 8),
    "hira": Method("HiRA-{}", _ours(adapters.HiRA), LORA_RANK),
    "shira": Method("SHiRA-{}", _ours(adapters.SHiRA), LORA_RANK),
    "kradapter": Method("KRAdapter", _ours(adapters.KRAdapter)),
    "oft": Method("OFT", _ours(adapters.OFT)),
    "svft": Method("SVFT, banded", _ours(adapters.SVFT)),
    "pranc": Method("PRANC", _ours(adapters.PRANC)),
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
        if out_of_memory(error):
            raise UnavailableError(OUT_OF_MEMORY) from error
        raise
    return model


def label(name: str, rank: int | None = None) -> str:
    """Return a method's name in tables."""
    return METHODS[name].label.format(rank or METHODS[name].rank)
