"""Import of PEFT adapters with the same outputs.

The tensors of the file define the layers; the targets in the config are only checked against them.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters import DoRA, LoRA, PiSSA, RandLoRA, VeRA
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.adapters.targets.sites import Site
from randlora_pl.adapters.weights import per_layer
from randlora_pl.interop.foreign.adapter import ExternalAdapter, sites_by_name
from randlora_pl.interop.peft.bases import draw_randlora, draw_vera, peft_count
from randlora_pl.interop.peft.config import STARTS, check_config, check_patterns, option
from randlora_pl.interop.peft.files import PeftAdapter, read
from randlora_pl.interop.peft.layerwise import TRANSLATIONS, Layers, Shapes
from randlora_pl.utils.errors import UserError

_NAMES = {
    "RANDLORA": ("randlora_lambda", "randlora_gamma"),
    "VERA": ("vera_lambda_b", "vera_lambda_d"),
    "LORA": ("lora_A.weight", "lora_B.weight"),
} | {name: each.names for name, each in TRANSLATIONS.items()}
_MAGNITUDE = "lora_magnitude_vector"
Shared = dict[str, list[Tensor]]


def import_peft(
    path: str | os.PathLike[str], model: nn.Module, *, bases_dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """Load a PEFT adapter into its base model as one of ours, in place.

    Args:
        path: Folder written by ``save_pretrained``: RandLoRA, LoRA, DoRA, PiSSA, VeRA or a method of `TRANSLATIONS`.
        model: Base model of any library, with the same layer names as in PEFT.
        bases_dtype: Dtype in which PEFT drew the bases of a RandLoRA adapter without stored bases; float16 if it was
            trained without bfloat16 (see `draw_randlora`).

    Returns:
        Model, ready for `save_adapter`, training or merging.

    Raises:
        UserError: The adapter cannot be converted exactly, or does not fit. The model is not changed.
    """
    translate(read(path), model, bases_dtype).inject(model)
    return model


def translate(adapter: PeftAdapter, model: nn.Module, bases_dtype: torch.dtype = torch.bfloat16) -> ExternalAdapter:
    """Convert a PEFT adapter, and check it against its model.

    Raises:
        UserError: As for `import_peft`.
    """
    method, source = check_config(adapter), str(adapter.path)
    check_patterns(adapter, (name for name, _ in model.named_modules()))
    tensors, extra = _split_head(adapter)
    dora = bool(method == "LORA" and adapter.config.get("use_dora"))
    by_layer, shared = _by_layer(tensors, method, dora, source)
    start = adapter.config.get("init_lora_weights")
    plain = method == "HIRA" or (method == "LORA" and not dora and start not in STARTS)
    known = sites_by_name(model, convolutions=plain)
    sites = {name: _site(adapter, known, model, name) for name in by_layer}
    for site in sites.values() if start in STARTS else ():
        if site.shape.layer.endswith("in_proj") or (site.transposed and start == "olora"):
            raise UserError(
                f"{source}: PEFT's {start} of {site.shape.layer} does not start at this weight. Merge it with PEFT "
                "instead: model.merge_and_unload()"
            )
    _check_targets(adapter, model, set(by_layer))
    for layer, own in by_layer.items():
        needed = [name.removesuffix(".weight") for name in _NAMES[method]] + [_MAGNITUDE] * dora
        if missing := [name for name in needed if name not in own]:
            raise UserError(f"{source}: {missing[0]} of {layer} is missing; it is damaged, copy it again.")
    layers = {site.shape.layer: by_layer[name] for name, site in sites.items()}
    shapes = {site.shape.layer: site.shape for site in sites.values()}
    parts = (adapter, layers, shapes)
    if method == "RANDLORA":
        foreign = _randlora(*parts, shared, bases_dtype)
    elif method == "VERA":
        foreign = _vera(*parts, shared)
    elif method in TRANSLATIONS:
        foreign = TRANSLATIONS[method].translate(*parts)
    else:
        foreign = _lora(adapter, layers, {site.shape.layer: name for name, site in sites.items()})
    foreign.extra.update(extra)
    foreign.check(model)
    return foreign


def _split_head(adapter: PeftAdapter) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the tensors into updates and completely trained modules."""
    saved = adapter.config.get("modules_to_save") or []
    extra = {
        name: tensor
        for name, tensor in adapter.tensors.items()
        if any(re.match(rf"(?:.*\.)?{re.escape(module)}\.", name) for module in saved)
    }
    return {name: tensor for name, tensor in adapter.tensors.items() if name not in extra}, extra


def _by_layer(tensors: Mapping[str, Tensor], method: str, dora: bool, source: str) -> tuple[Layers, Shared]:
    """Return the tensors of each layer by PEFT's short names, and every copy of the shared bases.

    Raises:
        UserError: A tensor is missing, or does not belong to the method.
    """
    prefix = method.lower()
    shared: Shared = {f"{prefix}_A": [], f"{prefix}_B": []} if method in ("RANDLORA", "VERA") else {}
    layers: Layers = {}
    for name, tensor in tensors.items():
        if (short := name.rpartition(".")[2]) in shared:
            shared[short].append(tensor)
            continue
        known = re.fullmatch(rf"(.*)\.({'|'.join(map(re.escape, _NAMES[method]))}|{_MAGNITUDE}(?:\.weight)?)", name)
        if known is None or (".base_layer." in known[1]):
            raise UserError(
                f"{source}: the tensor {name} does not belong to an update of a linear layer, and would be lost. Merge "
                "it with PEFT instead: model.merge_and_unload()"
            )
        if _MAGNITUDE in known[2] and not dora:
            raise UserError(f"{source}: {known[1]} has magnitudes, but use_dora is off in its config; copy it again.")
        layers.setdefault(known[1], {})[known[2].removesuffix(".weight")] = (
            tensor.float() if tensor.is_floating_point() else tensor
        )
    if not layers:
        raise UserError(f"{source} has no tensors of {method}; copy it again.")
    return layers, shared


def _site(adapter: PeftAdapter, sites: dict[str, Site], model: nn.Module, name: str) -> Site:
    """Return the site of one of PEFT's layers; packed attention weights must be ``target_parameters``.

    Raises:
        UserError: The layer does not exist, or its update cannot be imported.
    """
    if f"{name}.in_proj" in sites:
        parameters = adapter.config.get("target_parameters") or []
        if not any(f".{name}.in_proj_weight".endswith(f".{parameter}") for parameter in parameters):
            raise UserError(
                f"{adapter.path}: PEFT's LoRA of {name} (nn.MultiheadAttention) is not an update of its weights: the "
                "output projection's part acts twice. Merge it with PEFT instead: model.merge_and_unload()"
            )
        return sites[f"{name}.in_proj"]
    if name in sites:
        return sites[name]
    try:
        kind = type(model.get_submodule(name)).__name__
    except AttributeError:
        raise UserError(
            f"{adapter.path}: its target {name} does not exist in this model ({type(model).__name__}); its layers are "
            f"named like {next(iter(sites), 'nothing')!r}. Use the model that it was trained on."
        ) from None
    raise UserError(
        f"{adapter.path}: its target {name} is a {kind}; only updates of linear layers, and LoRA and HiRA of plain "
        "convolutions, can be imported."
    )


def _check_targets(adapter: PeftAdapter, model: nn.Module, layers: set[str]) -> None:
    """Check that the file has all layers that the config names.

    Raises:
        UserError: A layer is missing.
    """
    config = adapter.config
    targets = config.get("target_modules") or []
    if targets == "all-linear" or any(
        config.get(key) is not None for key in ("layers_to_transform", "exclude_modules")
    ):
        return
    saved = config.get("modules_to_save") or []

    def meant(name: str) -> bool:
        if any(re.match(rf"(?:^|.*\.){re.escape(module)}(?:$|\..*)", name) for module in saved):
            return False
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in targets)

    try:
        missing = [name for name, _ in model.named_modules() if meant(name) and name not in layers]
    except (re.error, TypeError):
        raise UserError(f"{adapter.path}: target_modules is {targets!r} in its config; copy it again.") from None
    if missing:
        raise UserError(
            f"{adapter.path}: {len(missing)} layers that its config names have no tensors in it ({missing[0]} ...); it "
            "is damaged, or belongs to another model."
        )


def _randlora(
    adapter: PeftAdapter, layers: Layers, shapes: Shapes, shared: Shared, dtype: torch.dtype
) -> ExternalAdapter:
    rank, key = int(adapter.config["r"]), option(adapter, "projection_prng_key", int, 0)
    config = adapter.config
    ours = {
        layer: {"lambdas": own["randlora_lambda"].T, "gammas": own["randlora_gamma"]} for layer, own in layers.items()
    }
    for layer, own in ours.items():
        if len(own["gammas"]) != (count := peft_count(shapes[layer].small, rank)):
            raise UserError(f"{adapter.path}: {layer} has {len(own['gammas'])} bases; its size and r require {count}.")
    if (pair := _pair(shared, adapter)) is None:
        sparse, very_sparse = bool(config.get("sparse")), bool(config.get("very_sparse"))
        pair = draw_randlora(key, rank, list(shapes.values()), sparse=sparse, very_sparse=very_sparse, dtype=dtype)
    a, b = (tensor.float() for tensor in pair)
    if a.dim() != 3 or b.dim() != 3 or a.shape[1] != 1:
        raise UserError(f"{adapter.path}: its bases have shapes {tuple(a.shape)} and {tuple(b.shape)}; copy it again.")
    small, large = (max(getattr(shape, side) for shape in shapes.values()) for side in ("small", "large"))
    a, b = a[..., :small], b[:large, : peft_count(small, rank)]  # PEFT stores more than any layer uses
    method = RandLoRA(
        rank=rank,
        alpha=option(adapter, "randlora_alpha", float, 640.0),
        dropout=option(adapter, "randlora_dropout", float, 0.0),
        init="lambda",
        pairing="peft",
        seed=key,
    )
    return ExternalAdapter(
        str(adapter.path), method, ours, Bases(key, a.permute(1, 0, 2).contiguous(), b.permute(1, 0, 2), stored=True)
    )


def _vera(adapter: PeftAdapter, layers: Layers, shapes: Shapes, shared: Shared) -> ExternalAdapter:
    rank, key = int(adapter.config["r"]), option(adapter, "projection_prng_key", int, 0)
    ours = {layer: {"b": own["vera_lambda_b"], "d": own["vera_lambda_d"]} for layer, own in layers.items()}
    a, b = (tensor.float() for tensor in _pair(shared, adapter) or draw_vera(key, rank, list(shapes.values())))
    method = VeRA(
        rank=rank,
        alpha=float(rank),  # PEFT has no scaling
        d_initial=option(adapter, "d_initial", float, 0.1),
        dropout=option(adapter, "vera_dropout", float, 0.0),
        seed=key,
    )
    return ExternalAdapter(str(adapter.path), method, ours, Bases(key, a[None], b[None], stored=True))


def _lora(adapter: PeftAdapter, layers: Layers, names: dict[str, str]) -> ExternalAdapter:
    """Convert LoRA, DoRA and PiSSA; ranks come from the tensors, alphas from PEFT's patterns."""
    config = adapter.config
    use_dora = bool(config.get("use_dora"))
    ours: Layers = {}
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    for layer, own in layers.items():
        a, b = own["lora_A"].flatten(1), own["lora_B"].flatten(1)  # also for convolutions
        ours[layer] = {"inner.A": a, "inner.B": b, "magnitude": own[_MAGNITUDE]} if use_dora else {"A": a, "B": b}
        name = f"{names[layer]}.in_proj_weight" if layer == f"{names[layer]}.in_proj" else names[layer]
        ranks[layer] = _pattern(config, "rank_pattern", name, config["r"])
        alphas[layer] = _pattern(config, "alpha_pattern", name, option(adapter, "lora_alpha", float, 8.0))
        if len(a) != ranks[layer]:
            raise UserError(f"{adapter.path}: lora_A of {layer} has {len(a)} rows, r is {ranks[layer]} in its config.")
    rslora, dropout = bool(config.get("use_rslora")), option(adapter, "lora_dropout", float, 0.0)
    if (start := config.get("init_lora_weights")) in STARTS:
        alphas = {layer: alpha * (ranks[layer] ** 0.5 if rslora else 1) for layer, alpha in alphas.items()}
        method: Any = PiSSA(rank=per_layer(ranks), alpha=per_layer(alphas), start=start, dropout=dropout)  # type: ignore[arg-type]
        return ExternalAdapter(str(adapter.path), method, ours)
    inner = LoRA(rank=per_layer(ranks), alpha=per_layer(alphas), rslora=rslora, dropout=dropout)  # type: ignore[arg-type]
    return ExternalAdapter(str(adapter.path), DoRA(inner) if use_dora else inner, ours)


def _pattern(config: Mapping[str, Any], key: str, name: str, default: Any) -> Any:
    """Return the value of PEFT's first pattern that matches the end of a layer's name."""
    patterns = config.get(key) or {}
    return next((value for p, value in patterns.items() if re.match(rf"(?:.*\.)?(?:{p})$", name)), default)


def _pair(shared: Shared, adapter: PeftAdapter) -> tuple[Tensor, Tensor] | None:
    """Return A and B, which a file may have in several copies, or None to draw them from the seed.

    Raises:
        UserError: Bases are missing, or the copies differ.
    """
    if not any(shared.values()):
        if adapter.config.get("save_projection", True):
            raise UserError(f"{adapter.path}: its bases are missing, although save_projection is set.")
        return None
    if missing := [name for name, copies in shared.items() if not copies]:
        raise UserError(f"{adapter.path}: {missing[0]} is missing; it is damaged, copy it again.")
    for name, (first, *others) in shared.items():
        if not all(torch.equal(first, other) for other in others):
            raise UserError(f"{adapter.path}: its copies of {name} differ; it is damaged.")
    a, b = (copies[0] for copies in shared.values())
    return a, b
