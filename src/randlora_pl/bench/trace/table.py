"""Methods of a traced step side by side, as a table and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from randlora_pl.adapters import Adapter, Frozen
from randlora_pl.bench.methods import METHODS, Method, Ours, language_rank
from randlora_pl.bench.trace.recorder import Traced
from randlora_pl.bench.trace.roofline import DeviceModel
from randlora_pl.bench.trace.step import StepSetup
from randlora_pl.utils.errors import UserError, near

DEFAULT = ("full", "lora", "randlora", "randlora-hadamard")
PROMPTED = ("frozen", "randlora")
"""Methods beside learned prompts, by default."""
OURS = {name: method for name, method in METHODS.items() if isinstance(method.adapt, Ours)}
OURS |= {"frozen": Method("no update", Ours(lambda **_: Frozen()))}
_LORA_RANKS = {"meta-llama/Meta-Llama-3-8B": 32}
"""LoRA's rank where it is not the one of `methods.language_rank` (Table 9 of the paper)."""


@dataclass
class Row:
    """A method and its step.

    Attributes:
        name: Name on the command line.
        label: Name in tables.
        trained: Parameters that train.
        step: What its step does.
    """

    name: str
    label: str
    trained: int
    step: Traced


def chosen(names: Sequence[str] | None) -> list[str]:
    """Return the methods to trace, in the order of the table.

    Raises:
        UserError: A method is unknown, or PEFT's.
    """
    for name in names or ():
        if name not in OURS:
            raise UserError(f"--methods: unknown {name!r}.{near(name, OURS)} Known: {' '.join(OURS)}")
    return [name for name in OURS if name in (names or DEFAULT)]


def adapter_of(
    name: str, setup: StepSetup, config: Mapping[str, Any], rank: int | None = None, dropout: float | None = None
) -> Adapter:
    """Return a method for a step.

    Args:
        name: Name on the command line.
        setup: The step.
        config: Options of the config's RandLoRA, empty if it has another method.
        rank: RandLoRA's rank, by default the config's.
        dropout: On the input of the updates, by default the config's.
    """
    method = OURS[name]
    assert isinstance(method.adapt, Ours)
    options = dict(config)
    own, drop = options.pop("rank", None), options.pop("dropout", 0.0)
    drop = drop if dropout is None else dropout
    known = method.rank
    if setup.task == "CausalLMTask":
        known = language_rank(name) or known
        if name in ("lora", "dora"):
            known = _LORA_RANKS.get(setup.options["name"], known)
    if not name.startswith("randlora"):
        return method.adapt.adapter(known, drop)
    if rank is not None and isinstance(options.get("alpha"), dict):
        options.pop("alpha")  # given for the config's rank
    try:
        return method.adapt.adapter(rank or own or known, drop, **options)
    except TypeError as error:  # an unknown option
        raise UserError(f"{error} (in the config's model.adapter)") from error


def label_of(name: str, adapter: Adapter) -> str:
    """Return a method's name in tables, with its rank."""
    rank = getattr(getattr(adapter, "inner", adapter), "rank", "")
    return OURS[name].label.format(rank)


def cells(rows: Sequence[Row], devices: Sequence[DeviceModel]) -> tuple[list[str], list[list[str]]]:
    """Return the table: titles and rows."""
    header = ["method", "trained", "kernels", "TFLOP", "GB moved", "casts", "GB cast", "peak GB"]
    header += [title for device in devices for title in (f"ms {device.label}", "of full", "of LoRA")]
    bases = [next((row for row in rows if row.name == name), None) for name in ("full", "lora")]
    table = []
    for row in rows:
        step = row.step
        line = [row.label, f"{row.trained:,}", f"{step.kernels:,}", f"{step.flops / 1e12:.2f}"]
        line += [
            f"{step.moved / 1e9:,.1f}",
            f"{step.casts:,}",
            f"{step.cast_bytes / 1e9:.1f}",
            f"{step.peak / 1e9:.1f}",
        ]
        for device in devices:
            seconds = step.seconds(device)
            line.append(f"{1000 * seconds:.1f}")
            line += [f"{seconds / base.step.seconds(device):.2f}" if base else "" for base in bases]
        table.append(line)
    return header, table


def longest(rows: Sequence[Row], device: DeviceModel, count: int) -> tuple[list[str], list[list[str]]]:
    """Return a table of the operators that take longest, in milliseconds of each method."""
    seconds = [row.step.by_operator(device) for row in rows]
    total = {name: max(one.get(name, 0.0) for one in seconds) for one in seconds for name in one}
    names = sorted(total, key=lambda name: -total[name])[:count]
    header = [f"ms on {device.label}", *(row.label for row in rows)]
    return header, [[name, *(f"{1000 * one.get(name, 0.0):.2f}" for one in seconds)] for name in names]


def as_json(rows: Sequence[Row], devices: Mapping[str, DeviceModel]) -> list[dict[str, Any]]:
    """Return the rows for a JSON file."""
    return [
        {
            "name": row.name,
            "label": row.label,
            "trained": row.trained,
            "kernels": row.step.kernels,
            "flops": row.step.flops,
            "bytes": row.step.moved,
            "casts": row.step.casts,
            "cast_bytes": row.step.cast_bytes,
            "peak_bytes": row.step.peak,
            "waits": row.step.waits,
            "seconds": {name: row.step.seconds(device) for name, device in devices.items()},
            "operators": {name: row.step.by_operator(device) for name, device in devices.items()},
        }
        for row in rows
    ]
