"""Injection of an adapter into a model, and its report."""

import logging
import re
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import Adapter, DeltaWeight
from randlora_pl.adapters.budget import count_parameters, match_budget
from randlora_pl.adapters.kept import base_buffers, hash_weights
from randlora_pl.adapters.layers.adapted import AdaptedLayer, RowBlocks, check_input_acts
from randlora_pl.adapters.layers.attach import attach
from randlora_pl.adapters.layers.weight_access import is_quantized, row_blocks, weight_of
from randlora_pl.adapters.methods.full import BaseWeightMethod
from randlora_pl.adapters.procedure import Procedure
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.adapters.targets.coverage import Coverage, coverage
from randlora_pl.adapters.targets.sites import Site
from randlora_pl.adapters.trained import Tensors, choose_beside, chosen_tensors, frozen_outputs, trained_tensors
from randlora_pl.adapters.weights import matches
from randlora_pl.utils.errors import UserError, brief, near
from randlora_pl.utils.text import byte_size, group_names, table

_log = logging.getLogger("randlora_pl")


@dataclass(frozen=True)
class LayerRow:
    """Adapted weight: layer, kind (``linear``, ``conv``, ``qkv``, ``q`` ...), shape (out, in), trainable parameters.

    A fully trained tensor has its own name and shape, and the kind ``tensor``, or ``trained`` beside an adapter.
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
        trained: Patterns of fully trained tensors beside the adapter, or None.
        beside: Tensors that match these patterns.
        frozen_heads: Linear layers that look like a new head and are frozen (`trained.frozen_outputs`).
        buffers: The model's own buffers before injection, on the CPU.
        coverage: Adapted part of the model; empty for methods that choose their tensors.
        procedure: What the method does between optimizer steps, or None; see `randlora_pl.adapters.procedure`.
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
        trained: Regular expressions over names of modules or tensors to train fully beside the adapter, such as a new
            head. Adapter files store them, and the base may have other values. They are not adapted.

    Returns:
        Report of the injection.

    Raises:
        UserError: A target matches nothing, a layer cannot be adapted, a rank is invalid, the adapter is not a method,
            or the model has adapters already, also PEFT's. The model is unchanged then.
    """
    _check_kinds(model, adapter)
    targets = [targets] if isinstance(targets, str) else targets
    trained = [trained] if isinstance(trained, str) else trained
    beside = trained_tensors(model, trained)
    base_hash = hash_weights(model, beside)
    buffers = {name: each.detach().cpu().clone() for name, each in base_buffers(model).items() if not each.is_meta}
    if isinstance(adapter, BaseWeightMethod):
        if targets is not None:
            raise UserError(f"{adapter.method()} chooses its tensors itself. Remove the targets.")
        chosen = {name: parameter for name, parameter in chosen_tensors(model, adapter).items() if name not in beside}
        model.requires_grad_(False)
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        report = InjectionReport(adapter, targets, _rows(chosen, "tensor"), 0, 0, notes=adapter.notes(model))
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
    return report


def _check_kinds(model: nn.Module, adapter: object) -> None:
    """Raise an error for anything but a plain model and a method."""
    if not isinstance(adapter, Adapter):
        found = " ".join(brief(adapter).split())  # models print many lines
        raise UserError(f"inject(model, adapter) needs a method such as RandLoRA(rank=6), not {found}.")
    modules = list(model.modules())
    if getattr(model, "adapter_report", None) is not None or any(isinstance(each, AdaptedLayer) for each in modules):
        raise UserError(
            "the model has adapters already. Merge them into plain layers with merge_and_unload(model) first."
        )
    if any(type(each).__module__.startswith("peft.") for each in modules):
        raise UserError("the model has adapters of PEFT. Pass its base model: model.unload() of PEFT returns it.")


def make_deltas(adapter: Adapter, sites: list[Site], model: nn.Module) -> tuple[dict[Site, DeltaWeight], str]:
    """Return the update of every site, on the device of its weight, and the fingerprint of the bases.

    Raises:
        UserError: An option has a pattern that matches no layer or a size that is too large for one; bases and
            trainable parameters together have more than four times the values of the model; or a quantized layer
            would have factors as large as its weight, in full precision, beside it.
    """
    shapes = [site.shape for site in sites]
    _check_patterns(adapter, [shape.layer for shape in shapes])
    # An invalid rank, or an adapter that is much larger than its model, is refused before memory is allocated.
    size, total = count_parameters(adapter, shapes), sum(parameter.numel() for parameter in model.parameters())
    most = max(1 << 27, 4 * total)  # 0.5 GB in float32 are always allowed
    if size <= most and (drawn := adapter.bases(shapes, torch.device("meta"))) is not None:
        size += sum(tensor.numel() for tensor in drawn.buffers())
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
    found: dict[str, dict[str, DeltaWeight]] = {}
    for site in sites:
        found.setdefault(site.path, {})[site.block or ""] = deltas[site]
    return {
        path: blocks[""] if "" in blocks else RowBlocks(blocks, row_blocks(model, path))
        for path, blocks in found.items()
    }


def _rows(tensors: Tensors, kind: str) -> list[LayerRow]:
    return [LayerRow(name, kind, tuple(parameter.shape), parameter.numel()) for name, parameter in tensors.items()]
