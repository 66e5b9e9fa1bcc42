"""The base model of an adapter, as its library builds it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from randlora_pl.adapters import AdapterFile
from randlora_pl.adapters.io.base_hash import hash_weights
from randlora_pl.adapters.trained import trained_tensors
from randlora_pl.interop.compare_outputs import logits, outputs
from randlora_pl.models import ImageTower, ModelIdentity, library_of, load_clip, load_vit
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.weights_files import find_weights, without_local_paths


@dataclass(frozen=True)
class Base:
    """A base model.

    Attributes:
        model: The whole model, without an adapter, in eval mode on the CPU.
        part: What an adapter is attached to: the model, or its image tower. Both name their tensors alike.
        identity: Which model it is; None for a model that a user gave.
        image_size: Height and width of its images in pixels; None where its inputs are unknown.
    """

    model: nn.Module
    part: nn.Module
    identity: ModelIdentity | None = None
    image_size: int | None = None

    def copy(self) -> "Base":
        """Another one, with weights of its own."""
        return copy.deepcopy(self)

    def outputs(self, model: nn.Module) -> list[Tensor] | None:
        """Return what such a model, adapted or not, makes of fixed random images, or the logits of fixed tokens."""
        if self.writes:
            return logits(model)
        return None if self.image_size is None else outputs(model, self.image_size)

    @property
    def writes(self) -> bool:
        """Whether it is a decoder of transformers."""
        whole: Any = self.model
        known = self.identity is not None and self.identity.library == "transformers"
        return known and bool(getattr(whole, "can_generate", bool)())

    def part_of(self, file: AdapterFile) -> nn.Module:
        """What another adapter of the same weights was attached to."""
        return _part(self.model, file)


def refuse_texts(file: AdapterFile, what: str) -> None:
    """Refuses an adapter of a language model for what only those of image models can.

    Args:
        file: The adapter.
        what: What only image models do.

    Raises:
        UserError: With the command that writes its merged weights.
    """
    if file.config.get("base_model", {}).get("library") == "transformers":
        raise UserError(
            f"{file.path} belongs to a language model, and only image models {what}. The merged weights: "
            f"randlora-pl adapter merge {file.path} --output FOLDER"
        )


def given(model: nn.Module) -> Base:
    """A model in memory, which stays as it is."""
    return Base(model, model)


def named(name: str, pretrained: str | None, seed: int = 0, size: int | None = None) -> Base:
    """A model of open_clip or timm.

    Args:
        name: Its name there.
        pretrained: A tag, a file, or ``random``.
        seed: Seed of random weights.
        size: Height and width of its images in pixels.

    Raises:
        UserError: There is no such model, or its weights are not to be had.
    """
    if library_of(name) == "timm":
        vit = load_vit(name, pretrained, img_size=size, seed=seed)
        model, identity, image = vit.model, vit.identity, vit.image
    else:
        clip = load_clip(name, pretrained, seed=seed, force_image_size=size)
        model, identity, image = clip.model, clip.identity, clip.image
    model.eval()
    return Base(model, model, identity, image.size)


def load_base(file: AdapterFile) -> Base:
    """The base model that an adapter names.

    Raises:
        UserError: It names none that open_clip or timm builds, or the weights are not to be had.
    """
    base = file.config.get("base_model", {})
    library, name, pretrained = (base.get(key) for key in ("library", "name", "pretrained"))
    if library == "transformers" and "task" in file.metadata:
        from randlora_pl.language.tasks.restore import base_model  # here, because it brings transformers

        model = base_model(file)
        return Base(
            model, _part(model, file), ModelIdentity(library, name or "", pretrained or "", seed=base.get("seed"))
        )
    if library not in ("open_clip", "timm") or not name or not pretrained:
        what = f"{library} {name}" if library else "no base model"
        raise UserError(
            f"{file.path} names {what}, which neither open_clip nor timm builds: build it in Python and call "
            "load_adapter(model, path)."
        )
    pretrained = find_weights(base, file.path) or pretrained
    try:
        found = named(name, pretrained, int(base.get("seed") or 0), base.get("image_size"))
    except UserError as error:
        raise UserError(f"the base model of {file.path} does not load: {error}") from error
    _add_classifier(found.model, file)
    return Base(found.model, _part(found.model, file), found.identity, found.image_size)


def _add_classifier(model: Any, file: AdapterFile) -> None:
    """Give a timm model a classifier where one trained beside the adapter; its values come with the adapter."""
    name = getattr(model, "default_cfg", {}).get("classifier")
    weight = file.tensors.get(f"{name}.weight")
    if file.trained and weight is not None:
        model.reset_classifier(len(weight))


def beside(file: AdapterFile, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that trained whole beside an adapter, by their keys in its base model's state dict."""
    return {name: file.tensors[name] for name in trained_tensors(model, file.trained)}


def _part(model: nn.Module, file: AdapterFile) -> nn.Module:
    """The model or its image tower, whichever has the hash that was saved.

    Raises:
        UserError: Neither has.
    """
    wanted = file.config.get("base_model", {}).get("weights_sha256_sampled")
    whole = hash_weights(model, trained_tensors(model, file.trained))
    if not wanted or whole == wanted:
        return model
    tower = ImageTower(model).eval() if hasattr(model, "visual") else None
    if tower is not None and hash_weights(tower, trained_tensors(tower, file.trained)) == wanted:
        return tower
    raise UserError(
        f"{file.path} was trained on other weights: {base_name(file)}; what has that name here is {whole[:12]}. "
        "Put the weights back that it was trained on."
    )


def same_base(files: Sequence[AdapterFile]) -> None:
    """Refuses adapters that do not belong to one base model.

    Raises:
        UserError: With the names of two that differ.
    """
    first, *others = files
    for other in others:
        one, two = ({**without_local_paths(file.config).get("base_model", {})} for file in (first, other))
        hashes = [base.pop("weights_sha256_sampled", None) for base in (one, two)]
        if hashes[0] != hashes[1] and (one != two or not one):
            raise UserError(
                f"{first.path} and {other.path} were trained on different base models: "
                f"{base_name(first)} and {base_name(other)}. Only updates of one base model go together."
            )


def base_name(file: AdapterFile) -> str:
    """Library, name, tag and the beginning of the hash, in words."""
    base = file.config.get("base_model", {})
    words = [str(base[key]) for key in ("library", "name", "pretrained") if base.get(key)]
    return " ".join([*words, f"(weights {str(base.get('weights_sha256_sampled') or 'unknown')[:12]})"])
