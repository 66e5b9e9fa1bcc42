"""Imported adapters: method, options, tensors by layer, and bases that are not drawn from our seeds."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from randlora_pl.adapters import Adapter, InjectionReport, adapted_layers, inject
from randlora_pl.adapters.base import DeltaWeight
from randlora_pl.adapters.derived import shapes_only
from randlora_pl.adapters.injection import make_deltas
from randlora_pl.adapters.kept import base_buffers, update_buffers
from randlora_pl.adapters.layers.built import has_own_forward
from randlora_pl.adapters.operations import report_of, use_bases
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.adapters.targets.select import select
from randlora_pl.adapters.targets.sites import CONV, Site, find_sites
from randlora_pl.adapters.weights import exact_pattern
from randlora_pl.utils.errors import UserError


@dataclass(frozen=True)
class ExternalAdapter:
    """Imported adapter with this project's names and shapes.

    ``layers`` has the tensors of each layer by our layer and tensor names, ``extra`` those outside the layers, such as
    a head, and ``source`` the path of the file, for messages.
    """

    source: str
    adapter: Adapter
    layers: dict[str, dict[str, Tensor]]
    bases: Bases | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def targets(self) -> list[str]:
        """Pattern that matches exactly its layers."""
        return [f"^{exact_pattern(self.layers)}"]

    def check(self, model: nn.Module) -> None:
        """Check that the adapter fits a base model.

        Raises:
            UserError: A layer is adapted differently, or a tensor has a different shape. The model is not changed.
        """
        sites = select(model, self.targets, False)
        with shapes_only():
            deltas = make_deltas(self.adapter, sites, model)[0]
        for site, delta in deltas.items():
            self._check_shapes(site.shape.layer, delta)
            drawn = getattr(delta, "bases", None)
            if self.bases is None or not isinstance(drawn, Bases):
                continue
            have, want = ((tuple(each.A.shape), tuple(each.B.shape)) for each in (self.bases, drawn))
            if any(mine < needed for mine, needed in zip(have[0] + have[1], want[0] + want[1], strict=True)):
                raise UserError(f"{self.source}: its bases are too small for this model: {have}, {want} are needed.")

    def _check_shapes(self, layer: str, delta: DeltaWeight) -> None:
        own = {**dict(delta.named_parameters()), **update_buffers(delta)}
        wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
        found = {name: tuple(tensor.shape) for name, tensor in self.layers[layer].items()}
        if wrong := [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]:
            name = wrong[0]
            raise UserError(
                f"{self.source}: {name} of {layer} has shape {found.get(name)}, this model needs {wanted.get(name)}; "
                "it belongs to another model, or is damaged."
            )

    def owned(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's own tensors for the imported, completely trained modules, by name.

        Raises:
            UserError: A tensor has a different shape or its module does not exist.
        """
        own: dict[str, Tensor] = {**dict(model.named_parameters()), **base_buffers(model)}
        for name, tensor in self.extra.items():
            if name in own and own[name].shape != tensor.shape:
                here, there = tuple(own[name].shape), tuple(tensor.shape)
                raise UserError(
                    f"{self.source}: {name} has shape {there}, in this model {here}. Build the model as it was trained."
                )
            module = name.rpartition(".")[0]
            if name not in own and any(other.startswith(f"{module}.") for other in own):
                raise UserError(f"{self.source}: {name} was trained as a whole, and this model has none.")
        return {name: own[name] for name in self.extra if name in own}

    def inject(self, model: nn.Module) -> InjectionReport:
        """Add the adapter to a base model in place."""
        self.check(model)
        owned = self.owned(model)
        parameters = [name for name, tensor in owned.items() if isinstance(tensor, nn.Parameter)]
        trained = [f"^{exact_pattern(parameters)}"] if parameters else None
        report = inject(model, self.adapter, self.targets, trained)
        self.fill(model)
        with torch.no_grad():
            for name, tensor in owned.items():
                tensor.copy_(self.extra[name])
        return report

    def fill(self, model: nn.Module) -> None:
        """Copy the values into a model that already has the method and layers."""
        if (procedure := report_of(model).procedure) is not None:
            procedure.ran = True  # in the training of the file
        if self.bases is not None:
            use_bases(model, self.bases)
        with torch.no_grad():
            for path, layer in adapted_layers(model).items():
                name = path if layer.weight_name == "weight" else f"{path}.in_proj".lstrip(".")
                if layer.delta is None:
                    continue
                for tensor, value in {**dict(layer.delta.named_parameters()), **update_buffers(layer.delta)}.items():
                    value.copy_(self.layers[name][tensor])


def plain_convolution(layer: nn.Module) -> bool:
    """Return True if PEFT's LoRA of a layer is a matrix (out, in * height * width) added to its weight.

    PEFT's A has no groups, dilation or padding mode.
    """
    if not isinstance(layer, nn.Conv2d) or has_own_forward(type(layer)):
        return False
    return layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"


def sites_by_name(model: nn.Module, convolutions: bool = False) -> dict[str, Site]:
    """Return the linear and attention layers that take one update for the whole weight, by name.

    With ``convolutions`` also those that PEFT's LoRA supports.
    """
    sites = [site for site in find_sites(model) if site.block is None]
    return {
        site.shape.layer: site
        for site in sites
        if site.kind != CONV or (convolutions and plain_convolution(model.get_submodule(site.path)))
    }
