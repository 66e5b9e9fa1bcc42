"""Updates of an adapter to its base model's tensors: with the model, or from the adapter's file alone."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from randlora_pl.adapters import AdapterFile, load_adapter
from randlora_pl.adapters.adapter_file import adapter_state
from randlora_pl.adapters.operations import delta_weights, weight_updates
from randlora_pl.adapters.random_bases import GENERATOR, WeightShape
from randlora_pl.adapters.sites import Site, find_sites
from randlora_pl.adapters.trained import update_buffers
from randlora_pl.interop.base_model import Base, beside, load_base
from randlora_pl.utils.errors import UserError

State = dict[str, Tensor]


def adapted(base: Base, file: AdapterFile) -> Base:
    """Return a copy of the base model with the adapter in place, not merged.

    Raises:
        UserError: The adapter does not fit.
    """
    made = base.copy()
    part = made.submodule_for(file)
    load_adapter(part, file.path)
    return Base(made.model, part.eval())


def updates(base: Base, file: AdapterFile) -> State:
    """Return the update of every tensor that an adapter changes, by key in the base model's state dict, float32.

    Effective weight minus frozen weight; for the model's own tensors and statistics, trained minus pretrained. Modules
    trained beside the adapter (`beside`) are excluded: their base may have been a fresh head.

    Raises:
        UserError: The adapter does not fit, or its update depends on the input.
    """
    file.adapter.require_matrix("the comparison", file.path)
    part = adapted(base, file).part
    before, state = base.submodule_for(file).state_dict(), adapter_state(part)
    whole = beside(file, part)
    own = {name: value for name, value in {**state.own, **state.kept}.items() if name in before and name not in whole}
    return weight_updates(part) | {name: value.detach() - before[name] for name, value in own.items()}


def weighted_sum(parts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> State:
    """Return sum_i w_i delta_i by key, summed in float64 (task arithmetic, Ilharco et al., 2023, section 2).

    Missing keys count as zero.
    """
    total: State = {}
    for part, weight in zip(parts, weights, strict=True):
        for key, delta in part.items():
            total[key] = total.get(key, torch.zeros((), dtype=torch.float64)) + weight * delta.double()
    return total


def interpolated(base: Tensor, tuned: Tensor, scale: float) -> Tensor:
    """Return W0 + s (W - W0) (WiSE-FT, Wortsman et al., 2022, equation 1), exact at both ends."""
    if scale in (0, 1) or not base.is_floating_point():
        return base if scale == 0 else tuned
    return (base.double() + scale * (tuned.double() - base.double())).to(base.dtype)


def weight_key(part: nn.Module, site: Site) -> str:
    """Return the state-dict key of a site's weight."""
    name = "in_proj_weight" if isinstance(part.get_submodule(site.path), nn.MultiheadAttention) else "weight"
    return f"{site.path}.{name}".lstrip(".")


def rows_of(weight: Tensor, site: Site) -> Tensor:
    """Return the rows (out, in) of a site, from a tensor in its module's layout."""
    weight = weight.T if site.transposed else weight.flatten(1)
    return weight if site.rows is None else weight[slice(*site.rows)]


def site_weights(part: nn.Module, layers: Collection[str]) -> State:
    """Return the weights (out, in) of layers of a model without an adapter, by layer name."""
    state, sites = part.state_dict(), [site for site in find_sites(part) if site.shape.layer in layers]
    return {site.shape.layer: rows_of(state[weight_key(part, site)], site) for site in sites}


@torch.no_grad()
def layer_updates(file: AdapterFile) -> State:
    """Return the update of every adapted weight by layer name, from the file alone if possible.

    A sum of random bases or a product of trained factors needs shapes and a seed only. Methods that read the base's
    weights (DoRA, PiSSA), or train the model's own tensors, load the base model.

    Raises:
        UserError: A tensor is missing, the random bases differ, a required base model is not available, or the update
            depends on the input.
    """
    file.adapter.require_matrix("the comparison", file.path)
    if file.adapter.trains_base or file.adapter.reads_weight:
        base = load_base(file)
        if not file.adapter.trains_base:
            return delta_weights(adapted(base, file).part)
        return {name: update for name, update in updates(base, file).items() if name in file.layers}
    shapes = [WeightShape(name, shape[0], shape[1]) for name, shape in file.layers.items()]
    bases = file.bases or file.adapter.bases(shapes, torch.device("cpu"))
    here = bases.fingerprint if bases is not None else ""
    there, generator = file.config.get("fingerprint"), file.config.get("generator")
    if file.bases is None and (here != there or generator != GENERATOR):
        raise UserError(
            f"{file.path}: its random bases are {str(there)[:12]} by {generator}, seed {file.adapter.key} gives "
            f"{here[:12]} by {GENERATOR} here; use the version of randlora-pl that wrote it."
        )
    found: State = {}
    for shape in shapes:
        weight = torch.empty(shape.out_features, shape.in_features)  # whose values change nothing
        delta = file.adapter.delta_weight(shape, weight, bases)
        tensors: State = {}
        above, _, last = shape.layer.rpartition(".")  # below its path, or its attention layer's, or a block of that
        for prefix in (f"{shape.layer}.delta.", f"{above}.delta.{last}.", f"{above}.delta."):
            start = prefix.lstrip(".")
            own = {name.removeprefix(start): value for name, value in file.tensors.items() if name.startswith(start)}
            tensors = tensors or own
        for name, value in {**dict(delta.named_parameters()), **update_buffers(delta)}.items():
            if name not in tensors or tensors[name].shape != value.shape:
                raise UserError(f"{file.path}: layer {shape.layer} has no tensor {name} of {tuple(value.shape)}.")
            value.copy_(tensors[name])
        found[shape.layer] = delta.change(weight)
    return found
