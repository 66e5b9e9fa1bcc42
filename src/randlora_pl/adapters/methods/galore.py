"""GaLore and Fira: full fine-tuning with an optimizer whose state is small."""

from typing import Annotated, Any

from torch import nn
from torch.optim import Optimizer

from randlora_pl.adapters.methods.full import FullFineTuning
from randlora_pl.adapters.methods.projected_adamw import ProjectedAdamW, state_size
from randlora_pl.adapters.targets.sites import find_sites
from randlora_pl.utils.options import Count, Positive


class GaLore(FullFineTuning):
    """GaLore: every tensor trains, and AdamW's moments of matrices are projected (Zhao et al., 2024).

    Weights of linear, attention and convolution layers are projected. Vectors, embeddings, language heads, tensors of
    ``trained``, and weights that are not in a layer have AdamW's update. See `ProjectedAdamW`.

    Examples:
        >>> report = inject(model, GaLore(rank=4))
        >>> optimizer = make_optimizer(model, lr=1e-3)  # in a training loop of your own
    """

    rank: Count = 128
    """Rank of the projection, which sets the memory of the moments. It is not the rank of the update."""
    scale: Annotated[float, Positive] = 0.25
    """Factor of the update of projected weights."""
    period: Count = 200
    """Optimizer steps between two computations of the projection."""

    learning_rates = (3e-5, 3e-5, 3e-5)  # its released script for GLUE
    group = "optimizer"
    size_option = ""  # the rank is not the size of the update: everything trains
    full_rank = False

    def optimizer(self, model: nn.Module, groups: Any, *, fused: bool = False, **options: Any) -> Optimizer:
        """Return `ProjectedAdamW`, which has no fused kernel."""
        options |= {"rank": self.rank, "scale": self.scale, "period": self.period, "full_rank": self.full_rank}
        return ProjectedAdamW(groups, projected_weights(model).values(), **options)

    def optimizer_numbers(self, model: nn.Module) -> int:
        """Return the numbers of the optimizer's state: projections, projected moments, and AdamW's two."""
        projected = projected_weights(model)
        chosen = {id(weight) for weight in projected.values()}
        others = sum(each.numel() for each in model.parameters() if each.requires_grad and id(each) not in chosen)
        return 2 * others + sum(state_size(each.shape, self.rank, self.full_rank) for each in projected.values())

    def notes(self, model: nn.Module) -> list[str]:
        """Return what is projected, for the report of an injection."""
        weights = projected_weights(model)
        cut = sum(min(each.shape[0], each[0].numel()) < self.rank for each in weights.values())
        note = f"moments of {len(weights)} weights are projected to rank {self.rank}"
        return [note + (f", cut to the smaller side in {cut} of them" if cut else "")]


class Fira(GaLore):
    """Fira: GaLore and the rest of the gradient, scaled as Adam scales the projected part (Chen et al., 2024).

    The update of a projected weight has full rank at every step, with the memory of GaLore. See `ProjectedAdamW`.

    Examples:
        >>> report = inject(model, Fira(rank=4))
        >>> optimizer = make_optimizer(model, lr=1e-3)  # in a training loop of your own
    """

    scale: Annotated[float, Positive] = 1.0
    """Factor of the update of projected weights."""

    learning_rates = (1e-4, 1e-4, 1e-4)  # its released script for commonsense, with scale 1
    full_rank = True


def projected_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable weights of layers, by name, without embeddings, language head and ``trained`` tensors."""
    beside = {row.layer for row in getattr(getattr(model, "adapter_report", None), "beside", ())}
    aside = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    aside |= {id(getattr(head, "weight", None))}
    found: dict[str, nn.Parameter] = {}
    for path in dict.fromkeys(site.path for site in find_sites(model)):
        layer = model.get_submodule(path)
        tensor = "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"
        weight: nn.Parameter = getattr(layer, tensor)
        name = f"{path}.{tensor}".lstrip(".")
        if weight.requires_grad and id(weight) not in aside and name not in beside:
            found[name] = weight
            aside.add(id(weight))  # a shared weight once
    return found
