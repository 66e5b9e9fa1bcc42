"""The base model that an adapter names, as its library gives it, and what it says about random inputs."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters import AdapterFile
from randlora_pl.errors import UserError
from randlora_pl.models import ImageTower, ModelIdentity, load_clip, load_vit

_TOWERS = ("TextHeadTask", "LinearHeadTask")  # their backbone is the image tower of a CLIP model


@dataclass(frozen=True)
class Base:
    """A base model.

    Attributes:
        build: Makes it anew, as a user of its library has it.
        adaptable: The part of it that the adapter was trained on, as a module with the same tensors.
        outputs: Its outputs on fixed random inputs, as one flat tensor; None where the inputs are unknown.
        identity: Which model it is; None for a model that a user gave.
    """

    build: Callable[[], nn.Module]
    adaptable: Callable[[nn.Module], nn.Module]
    outputs: Callable[[nn.Module], Tensor] | None
    identity: ModelIdentity | None = None


def given(model: nn.Module) -> Base:
    """A model in memory, which stays as it is."""
    return Base(lambda: copy.deepcopy(model), lambda plain: plain, None)


def named(name: str, pretrained: str | None, seed: int = 0, size: int | None = None, tower: bool = False) -> Base:
    """A model of open_clip or timm.

    Args:
        name: Its name there.
        pretrained: A tag, a file, or ``random``.
        seed: Seed of random weights.
        size: Height and width of its images in pixels.
        tower: Whether the adapter belongs to the image tower of a CLIP model alone.

    Raises:
        UserError: There is no such model, or its weights are not to be had.
    """
    from randlora_pl.models import library_of

    if library_of(name) == "timm":
        vit = load_vit(name, pretrained, img_size=size, seed=seed)
        return Base(
            lambda: copy.deepcopy(vit.model), lambda plain: plain, lambda m: m(_images(m, vit.image.size)), vit.identity
        )
    clip = load_clip(name, pretrained, seed=seed, force_image_size=size)

    def outputs(model: Any) -> Tensor:
        found = [model.encode_image(_images(model, clip.image.size))]
        if not tower:
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randint(1, int(model.vocab_size), (2, int(model.context_length)), generator=generator)
            found.append(model.encode_text(tokens))
        return torch.cat([output.flatten() for output in found])

    adaptable = ImageTower if tower else lambda plain: plain
    return Base(lambda: copy.deepcopy(clip.model), adaptable, outputs, clip.identity)


def of_adapter(file: AdapterFile) -> Base | None:
    """The base model that an adapter names; None where it names none.

    Raises:
        UserError: It cannot be built, for example because its weights are not on this machine.
    """
    base: dict[str, Any] = file.config.get("base_model", {})
    if not base.get("library") or not base.get("name"):
        return None
    tower = base["library"] == "open_clip" and file.metadata.get("task") in _TOWERS
    try:
        return named(base["name"], base.get("pretrained"), int(base.get("seed", 0)), base.get("image_size"), tower)
    except UserError as error:
        raise UserError(
            f"the base model of {file.path} cannot be built, and is needed for the check: {error}"
        ) from None


def _images(model: nn.Module, size: int) -> Tensor:
    """Two images of normal noise, in the dtype of the model."""
    noise = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return noise.to(next(model.parameters()).dtype)
