"""Base model of an adapter, as built by its library, the adapter's updates to it, and comparisons of outputs."""

import copy
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import open_clip
import timm
import torch
from torch import Tensor, nn

from randlora_pl.adapters import AdapterFile, adapter_file, delta_weights, load_adapter, operations, trained
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.adapters.sites import Site, find_sites, weight_key
from randlora_pl.language import offline
from randlora_pl.models import ImageTower, ModelIdentity, catalog, library_of, load_clip, load_vit
from randlora_pl.tasks.losses import check_numbers
from randlora_pl.tasks.restore import task_class
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.weights_files import base_arguments, base_words, looks_like_file, without_local_paths

_IMAGES, _TOKENS = 4, 24

TOLERANCE = 1e-4
"""Largest accepted difference of outputs, relative to the largest output."""

LOST = 0.1
"""Largest fraction of an adapter's change of the outputs that a conversion may lose."""

ROUNDING = 1e-6
"""Changes below this fraction of the largest output count as float32 rounding."""


@torch.no_grad()
def outputs(model: nn.Module, size: int) -> list[Tensor]:
    """Return outputs for ``size`` x ``size`` random images, and for tokens if there is a text tower; both are fixed."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_IMAGES, 3, size, size, generator=generator).to(next(model.parameters()).dtype)
    whole: Any = model
    if not hasattr(model, "encode_text"):
        return [model(images)]
    length = int(getattr(whole, "context_length", None) or 77)
    tokens = torch.randint(1, 1000, (_IMAGES, length), generator=generator)
    return [whole.encode_image(images), whole.encode_text(tokens)]


def difference(actual: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """Return the largest relative difference (to each output's largest expected value) and the largest absolute one.

    Both are infinite if ``actual`` has a non-finite value.

    Raises:
        UserError: ``expected`` has a non-finite value.
    """
    relative = absolute = 0.0
    for one, two in zip(actual, expected, strict=True):
        check_numbers(two, "the adapter")
        gap = float((one.float() - two.float()).abs().max())
        if not gap < float("inf"):  # also NaN
            return float("inf"), float("inf")
        absolute = max(absolute, gap)
        relative = max(relative, gap / max(float(two.abs().max()), torch.finfo(torch.float32).tiny))
    return relative, absolute


def change(tuned: list[Tensor], plain: list[Tensor]) -> float:
    """Return the largest absolute change that an adapter makes to the base model's outputs."""
    return max(float((one.float() - two.float()).abs().max()) for one, two in zip(tuned, plain, strict=True))


@torch.no_grad()
def logits(model: nn.Module) -> list[Tensor]:
    """Return the model's logits for fixed random tokens: (2, tokens, vocabulary), or (2, classes)."""
    config: Any = model.config
    ids = torch.randint(0, int(config.vocab_size), (2, _TOKENS), generator=torch.Generator().manual_seed(0))
    return [model(input_ids=ids).logits.float()]


def check_written(
    actual: list[Tensor], expected: list[Tensor], plain: list[Tensor], what: str, hint: str = "Please"
) -> float:
    """Return the largest absolute difference of a written model's outputs, named ``what`` in messages.

    Raises:
        UserError: The difference is more than rounding, or the adapter's change would be lost.
    """
    relative, absolute = difference(actual, expected)
    if relative > TOLERANCE:
        raise UserError(
            f"the {what} differ from the adapted one's by {relative:.1e} of the largest, more than {TOLERANCE:.0e}: "
            f"nothing was written. {hint} report this with the adapter's configuration."
        )
    # Relative to the outputs, the loss of a small update would look like rounding.
    lost = [
        change([one], [two]) / changed
        for one, two, base in zip(actual, expected, plain, strict=True)
        if (changed := change([two], [base])) > ROUNDING * float(two.abs().max())
    ]
    if (fraction := max(lost, default=0.0)) > LOST:
        raise UserError(
            f"the adapter changes the {what} by {change(expected, plain):.1e} only, and {fraction:.0%} of that would "
            "be lost in rounding: nothing was written. Keep the adapter, or train for longer."
        )
    return absolute


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

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Return the model's outputs for fixed random images or tokens; ``model`` may have an adapter."""
        if self.generates_text:
            return logits(model)
        assert self.image_size is not None
        return outputs(model, self.image_size)

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
        whole = trained.hash_weights(self.model, trained.trained_tensors(self.model, file.trained))
        if not wanted or whole == wanted:
            return self.model
        tower = ImageTower(self.model).eval() if hasattr(self.model, "visual") else None
        if tower is not None and trained.hash_weights(tower, trained.trained_tensors(tower, file.trained)) == wanted:
            return tower
        raise UserError(
            f"{file.path} was trained on different weights: {base_name(file)}; weights with this name here are "
            f"{whole[:12]}. Restore the original weights."
        )


def is_encoder(file: AdapterFile) -> bool:
    """Return True for an adapter of a language model that writes no texts."""
    texts = file.config.get("base_model", {}).get("library") == "transformers"
    return texts and not getattr(task_class(file), "generates", False)


def refuse_texts(file: AdapterFile, what: str, decoders: bool = False) -> None:
    """Raise for an adapter of a language model where only image models are supported.

    Args:
        file: Adapter.
        what: Verb phrase, what supported models do.
        decoders: True if decoders are supported as well.

    Raises:
        UserError: The model is not supported; the message has the command for merged weights.
    """
    kind, supported = "a language model", "image models"
    refused = file.config.get("base_model", {}).get("library") == "transformers"
    if decoders:
        kind, supported, refused = "an encoder of texts", "image models and decoders", is_encoder(file)
    if refused:
        raise UserError(
            f"{file.path} belongs to {kind}, and only {supported} {what}. For merged weights, run: "
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
        made = Base(model, model, identity)
        return replace(made, part=made.submodule_for(file))
    if library not in ("open_clip", "timm") or not name or not pretrained:
        known = " ".join(filter(None, (library, name))) or "an unnamed base model"
        raise UserError(
            f"{file.path} is an adapter of {known}, and only base models of open_clip and timm with known weights are "
            f"built here. Build it in Python, then call randlora_pl.adapters.load_adapter(model, {str(file.path)!r})."
        )
    here = base_arguments(base, file.path)
    try:
        made = named(
            here.get("name", name),
            here.get("pretrained", pretrained),
            int(base.get("seed") or 0),
            base.get("image_size"),
        )
    except UserError as error:
        raise UserError(f"the base model of {file.path} does not load: {error}") from error
    catalog.check_config(base, made.identity.config_sha256 if made.identity else None, file.path)
    whole: Any = made.model
    weight = file.tensors.get(f"{getattr(whole, 'default_cfg', {}).get('classifier')}.weight")
    if file.trained and weight is not None:  # a trained classifier of timm; the adapter has its values
        whole.reset_classifier(len(weight))
    return replace(made, part=made.submodule_for(file))


def beside(file: AdapterFile, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors fully trained alongside an adapter, by key in its base model's state dict."""
    return {name: file.tensors[name] for name in trained.trained_tensors(model, file.trained)}


def same_base(files: Sequence[AdapterFile]) -> None:
    """Check that all adapters belong to one base model.

    Raises:
        UserError: Two base models differ; the message contains both.
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
    return f"{base_words(base)} (weights {str(base.get('weights_sha256_sampled') or 'unknown')[:12]})".lstrip()


def hub_id(base: Mapping[str, Any]) -> str | None:
    """Return the Hub id of a base model, by the tables of its library, or None, as for weights of a file."""
    name, tag, repository = str(base.get("name", "")), str(base.get("pretrained", "")), ""
    if base.get("library") == "transformers":
        return name if tag == name != offline.NAME else None
    if name.startswith("hf-hub:"):
        repository = name.removeprefix("hf-hub:").partition("@")[0]
    elif base.get("library") == "open_clip" and not base.get("sha256"):
        repository = open_clip.get_pretrained_cfg(name, tag).get("hf_hub", "")
    elif base.get("library") == "timm" and tag != "random" and not (base.get("sha256") or looks_like_file(tag)):
        with suppress(RuntimeError):  # a tag of another version; None: a name of another version
            repository = getattr(timm.models.get_pretrained_cfg(name), "hf_hub_id", None) or ""
    repository = repository.strip("/")
    return repository if repository.count("/") == 1 else None


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
    trained alongside the adapter (`beside`) are excluded: their base may have been a fresh head.

    Raises:
        UserError: The adapter does not fit, or its update depends on the input.
    """
    file.adapter.require_matrix("the comparison", file.path)
    part = adapted(base, file).part
    before, state = base.submodule_for(file).state_dict(), adapter_file.adapter_state(part)
    whole = beside(file, part)
    own = {name: value for name, value in {**state.own, **state.kept}.items() if name in before and name not in whole}
    return operations.weight_updates(part) | {name: value.detach() - before[name] for name, value in own.items()}


def weighted_sum(parts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> State:
    """Return sum_i w_i delta_i by key, summed in float64 (task arithmetic, Ilharco et al., 2023, section 2).

    Missing keys count as zero.
    """
    total: State = {}
    for part, weight in zip(parts, weights, strict=True):
        for key, delta in part.items():
            total[key] = total.get(key, torch.zeros((), dtype=torch.float64)) + weight * delta.double()
    return total


def interpolate(base: Tensor, tuned: Tensor, scale: float) -> Tensor:
    """Return W0 + s (W - W0) (WiSE-FT, Wortsman et al., 2022, equation 1), exact at both ends."""
    if scale in (0, 1) or not base.is_floating_point():
        return base if scale == 0 else tuned
    return (base.double() + scale * (tuned.double() - base.double())).to(base.dtype)


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
    if problem := adapter_file.bases_problem(file, "" if bases is None else bases.fingerprint, ()):
        raise UserError(f"{file.path}: {problem[0]}; use the version of randlora-pl that wrote it.")
    by_layer: State = {}
    for shape in shapes:
        weight = torch.empty(shape.out_features, shape.in_features)  # whose values change nothing
        delta = file.adapter.delta_weight(shape, weight, bases)
        tensors = file.update_of(shape.layer)[-1]
        for name, value in trained.update_tensors(delta).items():
            if name not in tensors or tensors[name].shape != value.shape:
                raise UserError(f"{file.path}: layer {shape.layer} has no tensor {name} of {tuple(value.shape)}.")
            value.copy_(tensors[name])
        by_layer[shape.layer] = delta.change(weight)
    return by_layer
