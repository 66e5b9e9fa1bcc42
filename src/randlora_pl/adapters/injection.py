"""Injection of an adapter into a model, and the report of adapted and skipped layers, with their sizes."""

import logging
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import Adapter, DeltaWeight, Procedure
from randlora_pl.adapters.checkpoints import complete_state
from randlora_pl.adapters.layers import AdaptedLayer, RowBlocks, attach, check_input_acts
from randlora_pl.adapters.methods.full import BaseWeightMethod
from randlora_pl.adapters.random_bases import Bases, matches
from randlora_pl.adapters.select import Selection, choose_beside, count_parameters, match_budget, trains_whole
from randlora_pl.adapters.sites import CONV, Blocks, Site, find_sites, is_quantized, is_router, row_blocks, weight_of
from randlora_pl.adapters.trained import (
    Tensors,
    base_buffers,
    chosen_tensors,
    frozen_outputs,
    hash_weights,
    trained_tensors,
)
from randlora_pl.utils.errors import UserError, brief, near
from randlora_pl.utils.text import byte_size, group_names, table

_MOST_GROUPS = 4


@dataclass(frozen=True)
class Coverage:
    """Adapted part of a model.

    Attributes:
        line: One-line summary of adapted and skipped layers.
        share: Adapted or fully trained part of the weights (tensors with two dimensions or more) of the blocks.
        frozen: Number of frozen weights of the blocks by name pattern, the largest first.
        warning: Warning if a selection that the user did not name leaves out more than a half, else "".
    """

    line: str = ""
    share: float = 1.0
    frozen: Mapping[str, int] = field(default_factory=dict)
    warning: str = ""


def coverage(model: nn.Module, targets: list[str] | None, selection: Selection, beside: Collection[str]) -> Coverage:
    """Return what a selection adapts of a model.

    Args:
        model: Model without the adapter.
        targets: Requested targets.
        selection: Selected weights.
        beside: Names of fully trained tensors, whose layers do not count as skipped.
    """
    sites = [site for site in find_sites(model) if not site.block]
    blocks = Blocks(model, sites)
    adapted = {site.path for site in selection.sites}
    parts, left = [], []
    for name, convolution in (("linear layers", False), ("convolutions", True)):
        mine = [site for site in sites if (site.kind == CONV) == convolution]
        if not mine:
            continue
        chosen = [site for site in mine if site.path in adapted]
        every = sum(blocks.has(site) for site in mine)
        remarks = ["the paper's choice"] if selection.paper and not convolution else []
        remarks += [f"`{CONV if convolution else 'all'}`: {every}"] if every not in (0, len(chosen)) else []
        parts.append(f"{len(chosen)} of {len(mine)} {name}" + (f" ({'; '.join(remarks)})" if remarks else ""))
        left += [site for site in mine if site.path not in adapted] if chosen or not convolution else []
    left = [site for site in left if not trains_whole(site.path, beside)]
    sizes: dict[str, int] = {}
    for site in selection.sites:
        sizes[site.path] = sizes.get(site.path, 0) + site.shape.out_features * site.shape.in_features
    total, frozen = 0, dict[str, int]()
    for name, (path, size) in blocks.weights().items():
        done = size if name in beside else min(size, sizes.get(path, 0) if name in blocks.layers else 0)
        total += size
        if done < size:
            frozen[_pattern(name)] = frozen.get(_pattern(name), 0) + size - done
    share = 1 - sum(frozen.values()) / total if total else 1.0
    frozen = dict(sorted(frozen.items(), key=lambda item: -item[1]))
    parts.append(f"{_percent(share)} of the weights of the blocks")
    routers = {site.shape.layer: "router" for site in left if is_router(model, site.path)}
    line = ", ".join(parts) + _skipped(left, routers | selection.skipped)
    # The default, and an alias of all layers of a kind, are meant to cover the blocks.
    warned = share < 0.5 and (targets is None or not {"all", CONV}.isdisjoint(targets))
    return Coverage(line, share, frozen, _warning(blocks, share, frozen, targets) if warned else "")


def _warning(blocks: Blocks, share: float, frozen: Mapping[str, int], targets: list[str] | None) -> str:
    total = sum(frozen.values()) / (1 - share)
    tensors = {_pattern(name) for name in blocks.weights().keys() - blocks.layers}
    names = [f"{pattern} ({_percent(size / total)})" for pattern, size in list(frozen.items())[:3]]
    more = f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
    hints = []
    kinds = {_pattern(f"{site.path}.weight"): site.kind for site in blocks.sites if blocks.has(site)}
    missing = {CONV if kinds[pattern] == CONV else "all" for pattern in frozen if pattern in kinds}
    if missing - set(targets or []):
        hints.append(f"Adapt more with --model.targets '[{', '.join(sorted(missing | set(targets or ['all'])))}]'.")
    if tensors & frozen.keys():
        hints.append("Tensors outside linear layers and convolutions, such as stacked experts, cannot be adapted.")
    return (
        f"only {_percent(share)} of the weights of the blocks are adapted. Frozen: {', '.join(names)}{more}. "
        + " ".join(hints)
    ).strip()


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share < 0.995 or share == 1 else "> 99 %"


def _pattern(name: str) -> str:
    pattern = re.sub(r"(?<![^._])\d+(?![^.])", "*", name)
    return pattern if re.search(r"\w", pattern) else name  # nn.Sequential's layers are numbers alone


def _skipped(left: list[Site], reasons: dict[str, str]) -> str:
    """Return the skipped layers with their reasons; names that differ in numbers are grouped."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in (site.shape.layer for site in left):
        groups.setdefault((_pattern(name), reasons.get(name, "")), []).append(name)
    texts = [
        (f"{len(names)} x {pattern}" if len(names) > 1 else names[0]) + (f" ({reason})" if reason else "")
        for (pattern, reason), names in groups.items()
    ]
    if len(texts) > _MOST_GROUPS:
        rest = len(left) - sum(map(len, list(groups.values())[: _MOST_GROUPS - 1]))
        texts = [*texts[: _MOST_GROUPS - 1], f"and {rest} more"]
    return f"; skipped: {', '.join(texts)}" if texts else ""


_log = logging.getLogger("randlora_pl")


@dataclass(frozen=True)
class LayerRow:
    """Adapted weight: layer, kind (``linear``, ``conv``, ``qkv``, ``q`` ...), shape (out, in), trainable parameters.

    A fully trained tensor has its own name and shape, and the kind ``tensor``, or ``trained`` alongside an adapter.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    trainable: int


@dataclass
class InjectionReport:
    """Printable report of an injection, stored on the model for files and summaries.

    Examples:
        >>> report = inject(model, RandLoRA(rank=6))
        >>> report.trainable < report.total
        True
        >>> print(report)  # a table of the adapted layers
        layer ...

    Attributes:
        adapter: Adapter with all derived options.
        targets: Requested targets, None for the default.
        rows: Adapted weights, in model order.
        trainable: Number of trainable parameters.
        total: Number of parameters of the model, with trainable parameters and without random bases.
        fingerprint: SHA-256 of the random bases, or "".
        base_hash: Sampled SHA-256 of the weights before adaptation, without the tensors of ``trained``.
        notes: Notes for the user.
        stored_bases: Bases from a file, if no seed generates them.
        trained: Patterns of fully trained tensors alongside the adapter, or None.
        beside: Tensors that match these patterns.
        frozen_heads: Linear layers that look like a new head and are frozen (`trained.frozen_outputs`).
        buffers: The model's own buffers before injection, on the CPU.
        coverage: Adapted part of the model; empty for methods that choose their tensors.
        procedure: What the method does between optimizer steps, or None; see `randlora_pl.adapters.base`.
    """

    adapter: Adapter
    targets: list[str] | None
    rows: list[LayerRow]
    trainable: int
    total: int
    fingerprint: str = ""
    base_hash: str = ""
    notes: list[str] = field(default_factory=list)
    stored_bases: Bases | None = None
    trained: list[str] | None = None
    beside: list[LayerRow] = field(default_factory=list)
    frozen_heads: list[str] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict, repr=False)
    coverage: Coverage = field(default_factory=Coverage)
    procedure: Procedure | None = field(default=None, repr=False)

    def grouped(self) -> list[tuple[str, str, tuple[int, ...], int, int]]:
        """Return rows grouped over block numbers: (name, kind, shape, layers, parameters)."""
        rows = [*self.rows, *self.beside]
        groups = group_names((row.layer, (row.kind, row.shape)) for row in rows)
        return [
            (name, rows[own[0]].kind, rows[own[0]].shape, len(own), sum(rows[position].trainable for position in own))
            for (name, _), own in groups.items()
        ]

    def __str__(self) -> str:
        """Return a table of the adapted layers and the totals."""
        body = [
            (name, kind, " x ".join(map(str, shape)), str(layers), f"{count:,}")
            for name, kind, shape, layers, count in self.grouped()
        ]
        lines = [table(("layer", "kind", "out x in", "layers", "trainable"), body, right=(2, 3, 4))]
        percent = 100 * self.trainable / max(1, self.total)
        lines.append(
            f"{self.adapter.method()}: {self.trainable:,} of {self.total:,} parameters train ({percent:.2f} %)"
        )
        lines += [*filter(None, [self.coverage.line, self.coverage.warning]), *self.notes]
        if self.frozen_heads:
            names = ", ".join(self.frozen_heads[:3]) + (" ..." if len(self.frozen_heads) > 3 else "")
            train = f"Train a new head: inject(..., trained={self.frozen_heads[:3]})."
            lines.append(f"frozen and not adapted: {names}. {train}")
        return "\n".join(lines)


def inject(
    model: nn.Module,
    adapter: Adapter,
    targets: list[str] | str | None = None,
    trained: list[str] | str | None = None,
) -> InjectionReport:
    """Freeze a model and attach an adapter in place; each update gets its layer's mode, train or eval.

    With `randlora_pl.callbacks.AdapterCheckpoint`, checkpoints of your own LightningModule have no frozen part.

    Examples:
        >>> report = inject(model, RandLoRA(rank=6), trained=["head"])
        >>> report.trainable
        14510

    Args:
        model: Any module with linear, attention or convolution layers, also on the meta device (for counting).
        adapter: Method and its options.
        targets: Regular expressions over layer names, or the aliases ``qkv q k v kv o fc1 fc2 gate attn mlp all
            conv``, each with an optional tower prefix (``visual:mlp``). Default: packed q/k/v and both MLP matrices if
            the model has them; otherwise all linear layers of the blocks, or their convolutions if they have no linear
            layer.
        trained: Regular expressions over names of modules or tensors to train fully with the adapter, such as a new
            head. Adapter files store them, and the base may have other values. They are not adapted.

    Returns:
        Report of the injection.

    Raises:
        UserError: A target matches nothing, a layer cannot be adapted, a rank is invalid, the adapter is not a method,
            or the model already has adapters, also PEFT's. The model is unchanged then.
    """
    _check_kinds(model, adapter)
    targets = [targets] if isinstance(targets, str) else targets
    trained = [trained] if isinstance(trained, str) else trained
    beside = trained_tensors(model, trained)
    base_hash = hash_weights(model, beside)
    buffers = {name: each.detach().cpu().clone() for name, each in base_buffers(model).items() if not each.is_meta}
    if isinstance(adapter, BaseWeightMethod):
        chosen, covered = chosen_tensors(model, adapter, targets, beside), Coverage()
        if targets is not None:
            covered = coverage(model, targets, choose_beside(model, targets, adapter, beside), beside)
        model.requires_grad_(False)
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        attach(model, {})  # packed layers
        rows, notes = _rows(chosen, "tensor"), adapter.notes(model)
        report = InjectionReport(adapter, targets, rows, 0, 0, notes=notes, coverage=covered)
    else:
        selection = choose_beside(model, targets, adapter, beside)
        sites = selection.sites
        adapter, notes = match_budget(adapter, [site.shape for site in sites], model)
        deltas, fingerprint = make_deltas(adapter, sites, model)
        updates = _by_layer(model, sites, deltas)
        for path, update in updates.items():
            check_input_acts(model, path, update)
            update.train(model.get_submodule(path).training)
        covered = coverage(model, targets, selection, beside)
        if covered.warning and not _weight(model, sites[0]).is_meta:  # else the layers are only counted
            _log.warning("%s: %s", type(model).__name__, covered.warning)
        model.requires_grad_(False)
        attach(model, updates)
        rows = []
        for site in sites:
            size = sum(parameter.numel() for parameter in deltas[site].parameters())
            sides = site.shape.out_features, site.shape.in_features
            rows.append(LayerRow(site.shape.layer, site.kind, sides, size))
        report = InjectionReport(adapter, targets, rows, 0, 0, fingerprint, "", notes, coverage=covered)
    for parameter in beside.values():
        parameter.requires_grad_(True)
    report.trained, report.beside = trained, _rows(beside, "trained")
    trains = {row.layer for row in report.rows} | {row.layer.removesuffix(".weight") for row in report.rows}
    report.frozen_heads = frozen_outputs(model, trains, beside)
    report.base_hash, report.buffers = base_hash, buffers
    report.total = sum(parameter.numel() for parameter in model.parameters())
    report.trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    report.procedure = report.adapter.procedure(model)
    model.adapter_report = report  # type: ignore[assignment]
    if "adapter_loading" not in vars(model):
        handle = model.register_load_state_dict_pre_hook(complete_state)  # type: ignore[no-untyped-call]
        model.adapter_loading = handle
    return report


def _check_kinds(model: nn.Module, adapter: object) -> None:
    """Raise an error for anything but a plain model and a method."""
    if not isinstance(adapter, Adapter):
        given = " ".join(brief(adapter).split())  # models print many lines
        raise UserError(f"inject(model, adapter) needs a method such as RandLoRA(rank=6), not {given}.")
    modules = list(model.modules())
    if getattr(model, "adapter_report", None) is not None or any(isinstance(each, AdaptedLayer) for each in modules):
        raise UserError(
            "the model already has adapters. Merge them into plain layers with merge_and_unload(model) first."
        )
    if any(type(each).__module__.startswith("peft.") for each in modules):
        raise UserError("the model has adapters of PEFT. Pass its base model: model.unload() of PEFT returns it.")


def make_deltas(adapter: Adapter, sites: list[Site], model: nn.Module) -> tuple[dict[Site, DeltaWeight], str]:
    """Return the update of every site, on the device of its weight, and the fingerprint of the bases.

    Raises:
        UserError: An option has a pattern that matches no layer or a size that is too large for one; bases and
            trainable parameters together have more than four times the values of the model; or a quantized layer
            would have factors as large as its weight, in full precision, in addition to it.
    """
    shapes = [site.shape for site in sites]
    _check_patterns(adapter, [shape.layer for shape in shapes])
    # An invalid rank, or an adapter much larger than its model, is an error before memory is allocated.
    size, total = count_parameters(adapter, shapes), sum(parameter.numel() for parameter in model.parameters())
    most = max(1 << 27, 4 * total)  # 0.5 GB in float32 are always allowed
    if size <= most and (random_tensors := adapter.bases(shapes, torch.device("meta"))) is not None:
        size += sum(tensor.numel() for tensor in random_tensors.buffers())
    if size > most:
        raise UserError(
            f"{adapter.method()} would have {size:,} values ({byte_size(4 * size)}) in bases and parameters, "
            f"the model has {total:,}. Lower --model.adapter.num_bases or --model.adapter.rank."
        )
    for site in sites if any(each.holds_factors for each in adapter.leaves()) else ():
        if is_quantized(model.get_submodule(site.path)):
            raise UserError(
                f"{adapter.method()} holds factors as large as a weight, but {site.shape.layer} is quantized. Load the "
                "model without quantization, or choose a method with few numbers, such as LoRAXS or RandLoRA."
            )
    bases = adapter.bases(shapes, _weight(model, sites[0]).device)
    values, deltas, last = adapter.reads_weight, dict[Site, DeltaWeight](), time.monotonic()
    for number, site in enumerate(sites, 1):
        deltas[site] = adapter.delta_weight(site.shape, _weight(model, site, values), bases)
        if not isinstance(deltas[site], DeltaWeight):
            raise UserError(f"{adapter.method()}.delta_weight returns {brief(deltas[site])}. Return a DeltaWeight.")
        if time.monotonic() > last + 10:  # singular vectors of many large weights
            _log.info("%s: %d of %d weights are prepared", adapter.method(), number, len(sites))
            last = time.monotonic()
    return deltas, bases.fingerprint if bases is not None else ""


def _check_patterns(adapter: Adapter, layers: list[str]) -> None:
    """Raise an error for a pattern of an option, such as rank or alpha, that matches no adapted layer."""
    patterns = [
        (each.method(), name, pattern)
        for each in adapter.leaves()
        for name, option in each.options().items()
        if isinstance(option, dict)
        for pattern in option
    ]
    for method, name, pattern in patterns:
        try:
            fits = any(matches(pattern, layer) for layer in layers)
        except re.error as error:
            raise UserError(f"{name} pattern {pattern!r} is not a regular expression: {error}.") from None
        if not fits:
            raise UserError(
                f"{method}: {name} pattern {pattern!r} matches none of the {len(layers)} adapted layers, "
                f"{layers[0]!r} ... {layers[-1]!r}.{near(pattern, layers)}"
            )


def _weight(model: nn.Module, site: Site, values: bool = False) -> Tensor:
    """Return the frozen weight of a site, (out, in); without ``values`` a quantized weight is not dequantized."""
    weight = weight_of(model.get_submodule(site.path), values)
    return weight if site.rows is None else weight[slice(*site.rows)]


def _by_layer(model: nn.Module, sites: list[Site], deltas: dict[Site, DeltaWeight]) -> dict[str, DeltaWeight]:
    """Return one update per layer, by path; updates of row blocks are combined."""
    updates: dict[str, dict[str, DeltaWeight]] = {}
    for site in sites:
        updates.setdefault(site.path, {})[site.block or ""] = deltas[site]
    return {
        path: blocks[""] if "" in blocks else RowBlocks(blocks, row_blocks(model, path))
        for path, blocks in updates.items()
    }


def _rows(tensors: Tensors, kind: str) -> list[LayerRow]:
    return [LayerRow(name, kind, tuple(parameter.shape), parameter.numel()) for name, parameter in tensors.items()]
