"""Base model of an adapter, as built by its library."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from randlora_pl.adapters import AdapterFile
from randlora_pl.adapters.trained import hash_weights, trained_tensors
from randlora_pl.interop.compare_outputs import logits, outputs
from randlora_pl.models import ImageTower, ModelIdentity, library_of, load_clip, load_vit
from randlora_pl.models.folder import check_config
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.weights_files import base_arguments, without_local_paths


@dataclass(frozen=True)
class Base:
    """Base model of an adapter.

    ``model`` is complete, without an adapter, in eval mode on the CPU; ``part`` is the module with the adapter: the
    model or its image tower, with the same tensor names. Images are ``image_size`` pixels wide and high, if known.
    """

    model: nn.Module
    part: nn.Module
    identity: ModelIdentity | None = None
    image_size: int | None = None

    def copy(self) -> "Base":
        """Return a copy with its own weights."""
        return copy.deepcopy(self)

    def outputs(self, model: nn.Module) -> list[Tensor] | None:
        """Return the model's outputs for fixed random images or tokens; ``model`` may have an adapter."""
        if self.generates_text:
            return logits(model)
        return None if self.image_size is None else outputs(model, self.image_size)

    @property
    def generates_text(self) -> bool:
        """True for a decoder of transformers."""
        whole: Any = self.model
        known = self.identity is not None and self.identity.library == "transformers"
        return known and bool(getattr(whole, "can_generate", bool)())

    def submodule_for(self, file: AdapterFile) -> nn.Module:
        """Return the model or its image tower, to which an adapter was attached: whichever matches the saved hash.

        Raises:
            UserError: Neither matches.
        """
        wanted = file.config.get("base_model", {}).get("weights_sha256_sampled")
        whole = hash_weights(self.model, trained_tensors(self.model, file.trained))
        if not wanted or whole == wanted:
            return self.model
        tower = ImageTower(self.model).eval() if hasattr(self.model, "visual") else None
        if tower is not None and hash_weights(tower, trained_tensors(tower, file.trained)) == wanted:
            return tower
        raise UserError(
            f"{file.path} was trained on other weights: {base_name(file)}; weights with this name here are "
            f"{whole[:12]}. Restore the original weights."
        )


def refuse_texts(file: AdapterFile, what: str) -> None:
    """Raise for an adapter of a language model where only image models are supported; ``what`` is a verb phrase.

    Raises:
        UserError: The adapter belongs to a language model; the message has the command for merged weights.
    """
    if file.config.get("base_model", {}).get("library") == "transformers":
        raise UserError(
            f"{file.path} belongs to a language model, and only image models {what}. For merged weights, run: "
            f"randlora-pl adapter merge {file.path} --output FOLDER"
        )


def named(name: str, pretrained: str | None, seed: int = 0, size: int | None = None) -> Base:
    """Build a model of open_clip or timm for square images of ``size`` pixels; ``pretrained`` may be a weights file.

    Raises:
        UserError: The model is unknown, or its weights are not available.
    """
    made = (
        load_vit(name, pretrained, img_size=size, seed=seed)
        if library_of(name) == "timm"
        else load_clip(name, pretrained, seed=seed, force_image_size=size)
    )
    model: nn.Module = made.model.eval()
    return Base(model, model, made.identity, made.image.size)


def load_base(file: AdapterFile) -> Base:
    """Build the base model of an adapter.

    Raises:
        UserError: Neither open_clip nor timm builds the base model, or its weights are not available.
    """
    base = file.config.get("base_model", {})
    library, name, pretrained = (base.get(key) for key in ("library", "name", "pretrained"))
    if library == "transformers" and "task" in file.metadata:
        from randlora_pl.language.tasks.common import plain_task  # imported here, because it loads transformers

        model = plain_task(file, dequantized=True).build()
        identity = ModelIdentity(library, name or "", pretrained or "", seed=base.get("seed"))
        found = Base(model, model, identity)
        return replace(found, part=found.submodule_for(file))
    if library not in ("open_clip", "timm") or not name or not pretrained:
        what = f"{library} {name}" if library else "no base model"
        raise UserError(
            f"{file.path} names {what}, which neither open_clip nor timm builds. Build it in Python and call "
            "load_adapter(model, path)."
        )
    here = base_arguments(base, file.path)
    try:
        found = named(
            here.get("name", name),
            here.get("pretrained", pretrained),
            int(base.get("seed") or 0),
            base.get("image_size"),
        )
    except UserError as error:
        raise UserError(f"the base model of {file.path} does not load: {error}") from error
    check_config(base, found.identity.config_sha256 if found.identity else None, file.path)
    whole: Any = found.model
    weight = file.tensors.get(f"{getattr(whole, 'default_cfg', {}).get('classifier')}.weight")
    if file.trained and weight is not None:  # a trained classifier of timm; the adapter has its values
        whole.reset_classifier(len(weight))
    return replace(found, part=found.submodule_for(file))


def beside(file: AdapterFile, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors trained completely beside an adapter, by key in its base model's state dict."""
    return {name: file.tensors[name] for name in trained_tensors(model, file.trained)}


def same_base(files: Sequence[AdapterFile]) -> None:
    """Check that all adapters belong to one base model.

    Raises:
        UserError: Two base models differ; the message names them.
    """
    first, *others = files
    for other in others:
        one, two = ({**without_local_paths(file.config).get("base_model", {})} for file in (first, other))
        hashes = [base.pop("weights_sha256_sampled", None) for base in (one, two)]
        if hashes[0] != hashes[1] and (one != two or not one):
            raise UserError(
                f"{first.path} and {other.path} were trained on different base models: "
                f"{base_name(first)} and {base_name(other)}. Only updates of one base model can be combined."
            )


def base_name(file: AdapterFile) -> str:
    """Return library, name, tag and the start of the weights' hash."""
    base = file.config.get("base_model", {})
    words = [str(base[key]) for key in ("library", "name", "pretrained") if base.get(key)]
    return " ".join([*words, f"(weights {str(base.get('weights_sha256_sampled') or 'unknown')[:12]})"])
