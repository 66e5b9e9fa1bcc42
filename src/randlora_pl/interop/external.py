"""Adapters of other programs: method, options, tensors by layer, bases that no seed of ours gives, and their saving.

An imported adapter is saved as a task if there is a head or class names, or the model is a decoder, else the update
alone.

Vision checkpoints of RandLoRA's official code are PyTorch files with the state of trainable parameters. Each adapted
weight has ``<weight>_w_loramat_B`` (n, r), our lambda, and ``<weight>_w_loramat_A`` (n, d), our gamma. The file also
has ``basis``, the pair B (count, D, r) and A (1, r, d) at the largest sizes, and ``seed``. There are d // r + 1 bases,
one more than in PEFT if r divides d; columns and rows are paired as in PEFT. The file does not have the scaling: the
code's default is 1 / r.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters import Adapter, derived, injection, operations, save_adapter, trained
from randlora_pl.adapters.layers import has_own_forward
from randlora_pl.adapters.methods import randlora
from randlora_pl.adapters.random_bases import Bases, exact_pattern
from randlora_pl.adapters.select import select
from randlora_pl.adapters.sites import CONV, Site, find_sites
from randlora_pl.interop.base_model import Base
from randlora_pl.models import ImageTower
from randlora_pl.models.weights import load_without_code
from randlora_pl.tasks import ImageTask, Objective, restore
from randlora_pl.utils.adapter_schema import check_arguments
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.weights_files import base_arguments


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
        with derived.derived_once(nothing=True):
            deltas = injection.make_deltas(self.adapter, sites, model)[0]
        for site, delta in deltas.items():
            layer, own = site.shape.layer, trained.update_tensors(delta)
            wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
            present = {name: tuple(tensor.shape) for name, tensor in self.layers[layer].items()}
            if wrong := [
                name for name in sorted(wanted.keys() | present.keys()) if wanted.get(name) != present.get(name)
            ]:
                shapes = f"has shape {present.get(wrong[0])}, this model needs {wanted.get(wrong[0])}"
                raise UserError(
                    f"{self.source}: {wrong[0]} of {layer} {shapes}; it belongs to another model, or is damaged."
                )
        needed = operations.with_bases(deltas.values()).values()
        if self.bases is not None and (problem := operations.basis_size_error(self.bases, needed)):
            raise UserError(f"{self.source}: {problem} for this model.")

    def owned(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's own tensors for the imported, completely trained modules, by name.

        Raises:
            UserError: A tensor has a different shape or its module does not exist.
        """
        own: dict[str, Tensor] = {**dict(model.named_parameters()), **trained.base_buffers(model)}
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

    def inject(self, model: nn.Module) -> injection.InjectionReport:
        """Add the adapter to a base model in place."""
        self.check(model)
        owned = self.owned(model)
        parameters = [name for name, tensor in owned.items() if isinstance(tensor, nn.Parameter)]
        whole = [f"^{exact_pattern(parameters)}"] if parameters else None
        report = injection.inject(model, self.adapter, self.targets, whole)
        self.fill(model)
        with torch.no_grad():
            for name, tensor in owned.items():
                tensor.copy_(self.extra[name])
        return report

    def fill(self, model: nn.Module) -> None:
        """Copy the values into a model that already has the method and layers."""
        if (procedure := operations.report_of(model).procedure) is not None:
            procedure.ran = True  # in the training of the file
        if self.bases is not None:
            operations.use_bases(model, self.bases)
        with torch.no_grad():
            for path, layer in operations.adapted_layers(model).items():
                name = path if layer.weight_name == "weight" else f"{path}.in_proj".lstrip(".")
                if layer.delta is None:
                    continue
                for tensor, value in trained.update_tensors(layer.delta).items():
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


_LAMBDA, _GAMMA = "w_loramat_B", "w_loramat_A"


def import_official(path: str | os.PathLike[str], model: nn.Module, *, alpha: float = 1.0) -> nn.Module:
    """Load a checkpoint of the official vision code into its base model in place.

    Args:
        path: File written by ``torch.save``; no code in it is run.
        model: open_clip or timm model that it was trained on, or its image tower.
        alpha: Numerator of the scaling alpha / r. The file does not have it; the code's default is 1.

    Returns:
        Model, ready for `save_adapter`, training or merging.

    Raises:
        UserError: The file is not such a checkpoint or does not fit; the model is not changed.
    """
    translate_official(path, model, alpha).inject(model)
    return model


def translate_official(path: str | os.PathLike[str], model: nn.Module, alpha: float = 1.0) -> ExternalAdapter:
    """Convert an official checkpoint, and check it against its model.

    Raises:
        UserError: As for `import_official`.
    """
    state, sites = _read(Path(path)), sites_by_name(model)
    pairs = {name.removesuffix(_LAMBDA): name for name in state if name.endswith(_LAMBDA)}
    if not pairs or not isinstance(state.get("basis"), tuple | list) or len(state["basis"]) != 2:
        raise UserError(f"{path} is not a checkpoint of the official RandLoRA code: it needs *_{_LAMBDA} and basis.")
    layers: dict[str, dict[str, Tensor]] = {}
    for weight, name in pairs.items():
        gamma = state.get(weight + _GAMMA)
        if gamma is None:
            raise UserError(f"{path}: {weight}{_GAMMA} is missing; it is damaged, copy it again.")
        layer = _layer(weight, list(sites), str(path), type(model).__name__)
        if layer in layers:
            raise UserError(f"{path}: two of its weights match {layer}. Use the model that it was trained on.")
        layers[layer] = {"lambdas": state[name].float(), "gammas": gamma.float()}
    ranks = sorted({tensors["lambdas"].shape[1] for tensors in layers.values()})
    if len(ranks) > 1:
        raise UserError(f"{path}: its weights have ranks {ranks}; the official code has one rank.")
    if not all(isinstance(tensor, Tensor) and tensor.dim() == 3 for tensor in state["basis"]):
        raise UserError(f"{path}: its basis is not a pair of three-dimensional tensors; copy it again.")
    b, a = (tensor.float() for tensor in state["basis"])
    most = max(len(tensors["lambdas"]) for tensors in layers.values())
    seed = state.get("seed", 0)
    seed = int(seed) if isinstance(seed, int) or (isinstance(seed, Tensor) and seed.numel() == 1) else 0
    method = randlora.of_official_code(ranks[0], alpha, seed)
    bases = Bases(seed, a, b[:most], stored=True)  # the file has 1,000 bases, most unused
    foreign = ExternalAdapter(str(path), method, layers, bases)
    foreign.check(model)
    return foreign


def _read(path: Path) -> Mapping[str, Any]:
    """Read the state in a file without running code."""
    if not path.is_file():
        raise UserError(f"{path} is not a file. Pass the checkpoint written by the official code.")
    state = load_without_code(path)
    if isinstance(state, Mapping) and isinstance(inner := state.get("state_dict"), Mapping):
        state = {**inner, **{name: state[name] for name in ("basis", "seed") if name in state}}
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, not the state of a model.")
    state = {str(name): value for name, value in state.items()}
    for name, value in state.items():
        matrix = isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()
        if name.endswith((_LAMBDA, _GAMMA)) and not matrix:
            raise UserError(f"{path}: {name} is not a matrix of numbers; it is damaged, copy it again.")
    return state


def _layer(weight: str, layers: list[str], source: str, model: str) -> str:
    """Return our layer for a name in the file.

    The code wraps the model, so names may have the wrapper's prefix; dots and underscores are equivalent.
    """
    plain = re.sub(r"[._]+", "_", weight).strip("_")
    plain = "_" + re.sub(r"_(?:in_proj_weight|in_proj|weight)$", "", plain)
    names = {layer: "_" + re.sub(r"[._]+", "_", layer.removesuffix(".in_proj")) for layer in layers}
    exact = [layer for layer, own in names.items() if own == plain]
    matches = exact or [layer for layer, own in names.items() if plain.endswith(own) or own.endswith(plain)]
    if len(matches) > 1:  # `transformer...` of the text tower also ends `visual.transformer...`
        longest = max(len(layer.removesuffix(".in_proj")) for layer in matches)
        matches = [layer for layer in matches if len(layer.removesuffix(".in_proj")) == longest]
    if len(matches) != 1:
        what = "does not exist" if not matches else f"may be {' or '.join(matches[:2])}"
        raise UserError(f"{source}: its target {weight.rstrip('._')} {what} in this model ({model}).")
    return matches[0]


TASK = "task.json"
"""Our file next to an adapter of PEFT, with its task; PEFT ignores it."""

TEMPLATES = ["a photo of a {}."]
"""Prompts of an imported text head without prompts."""


@dataclass(frozen=True)
class ImportPlan:
    """Plan for saving an imported adapter.

    ``task`` is None for the update alone; ``arguments`` are its constructor's, without image model, adapter and
    targets. ``note`` is for the user, about tensors that were not converted. ``several``: an image may have several
    of the classes.
    """

    foreign: ExternalAdapter
    base: Base
    task: type[Objective] | None = None
    classnames: list[str] = field(default_factory=list)
    head: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    templates: list[str] = field(default_factory=lambda: TEMPLATES)
    note: str = ""
    several: bool = False

    @classmethod
    def make(
        cls,
        foreign: ExternalAdapter,
        base: Base,
        head: dict[str, Tensor],
        saved: Mapping[str, Any],
        name: str | None,
        classnames: list[str],
    ) -> "ImportPlan":
        """Choose the task: as requested, by the saved head, or by the adapted towers if there are class names.

        Args:
            foreign: The adapter.
            base: Its base model.
            head: Tensors of a head that was trained with it.
            saved: Content of `TASK`; empty if unknown.
            name: The requested task.
            classnames: The requested class names.

        Raises:
            UserError: The requested task does not fit the model, the head or the class names.
        """
        task, kept = restore.named_task(name), restore.named_task(saved.get("task"))
        classnames = classnames or list(saved.get("classnames", []))
        extra, note = foreign.extra, ""
        weights = [tensor for name, tensor in extra.items() if name.endswith("weight") and tensor.dim() == 2]
        biases = [tensor for name, tensor in extra.items() if name.endswith("bias")]
        if extra and (len(weights) != 1 or len(extra) != 1 + len(biases)):
            note = f"Trained completely and kept as extra tensors: {', '.join(extra)}.\n"
        elif any(bool(torch.count_nonzero(bias)) for bias in biases):
            note = "The head has a bias, which LinearHeadTask does not support; kept as extra tensors: "
            note += f"{', '.join(extra)}.\n"
        elif extra and base.identity is not None and base.identity.library == "timm":
            head, kept = {"head": weights[0].float()}, restore.adopting("linear head")
        clip = base.identity is not None and base.identity.library == "open_clip"
        if task is None and kept is not None and issubclass(kept, ImageTask):
            task = kept
        elif task is None and clip and len(classnames) > 1:
            visual = all(layer.startswith("visual.") for layer in foreign.layers)
            task = restore.adopting("image tower" if visual else "both towers")
        if task is None:
            return cls(foreign, base, note=note)
        name, linear = task.__name__, task.adopts == "linear head"
        if not linear and not clip:
            raise UserError(f"--task {name} needs a CLIP model with a text tower; this one has none.")
        if linear and "head" not in head:
            raise UserError(f"--task {name} needs a head, and the adapter has none that fits." + note)
        if linear and not classnames:
            classnames = [f"class {number}" for number in range(len(head["head"]))]
        if "head" in head and len(head["head"]) != len(classnames):
            raise UserError(f"the head has {len(head['head'])} classes, and there are {len(classnames)} class names.")
        if len(classnames) < 2:
            raise UserError(f"--task {name} needs class names. Add --classnames FILE, with one name per line.")
        if task != kept:
            return cls(foreign, base, task, classnames, note=note)
        arguments = dict(saved.get("arguments", {}))
        several, templates = saved.get("several_labels", False), saved.get("templates", TEMPLATES)
        return cls(foreign, base, task, classnames, head, arguments, templates, note, several)

    def save(self, ours: nn.Module, path: Path) -> Path:
        """Save the base model's adapter, as its task does if there is one.

        Raises:
            UserError: The task has no place for a tensor, or other arguments.
        """
        identity, foreign = self.base.identity, self.foreign
        assert identity is not None
        if self.task is None:
            return save_adapter(ours, path, base_model=identity.as_dict(), extra=foreign.extra)
        options = {**self.arguments, "adapter": foreign.adapter, "targets": foreign.targets}
        kind = self.task
        if self._is_decoder:
            if foreign.extra:
                raise UserError(
                    f"{foreign.source}: {next(iter(foreign.extra))} is not an update, and a decoder has no head."
                )
        else:
            here = base_arguments(identity.as_dict(), path)
            options |= {"name": identity.name, "pretrained": identity.pretrained, "seed": identity.seed or 0} | here
        check_arguments(kind, self.arguments, f"{foreign.source}, {TASK}")
        task = kind(**options)
        if isinstance(task, ImageTask):
            task.set_classes(self.classnames, self.templates, several=self.several)
        task.adapt()
        foreign.fill(task.model)
        if self.head:
            task.load_head(self.head)
        return task.save(path)

    @property
    def _is_decoder(self) -> bool:
        return self.task is not None and self.task.adopts == "decoder"

    def next(self, path: Path) -> str:
        """Return the next command to run."""
        if self.task:
            inputs = "--texts FILE" if self._is_decoder else "--images FOLDER"
            return f"Next: randlora-pl predict --adapter {path} {inputs}"
        merge = f"randlora-pl adapter merge {path} --output FILE"
        return f"{self.note}Next: {merge}; or, in Python: load_adapter(model, {str(path)!r})"


def load_decoder(name: str, pretrained: str | None, saved: Mapping[str, Any]) -> tuple[Base, dict[str, Any]]:
    """Build a decoder of transformers, and return it with the arguments of its task.

    Args:
        name: Hub id or folder.
        pretrained: Folder with its weights, or ``random``.
        saved: Arguments of the task it was exported from; empty if unknown.

    Raises:
        UserError: The model is not available, or the arguments do not belong to the task.
    """
    kind = restore.adopting("decoder")
    check_arguments(kind, saved, TASK)
    arguments = {**saved, "name": name, "pretrained": pretrained, "quantize": None}
    task = kind(**arguments)
    model = task.build()
    return Base(model, model, task.identity), arguments


def check_base(path: Path, saved: Mapping[str, Any], base: Base) -> None:
    """Check the weights' hash stored with an adapter against the base model; PEFT's own adapters have none.

    Args:
        path: Path of the adapter.
        saved: Content of `TASK`; empty if unknown.
        base: The base model.

    Raises:
        UserError: Neither the model nor its image tower matches the hash.
    """
    named = saved.get("base_model") or {}
    wanted = named.get("weights_sha256_sampled")
    parts = [base.model, *([ImageTower(base.model)] if hasattr(base.model, "visual") else [])]
    if wanted and wanted not in (hashes := [trained.hash_weights(part) for part in parts]):
        words = " ".join(str(named[key]) for key in ("name", "pretrained", "seed") if named.get(key) is not None)
        raise UserError(
            f"{path} was trained on different weights ({words}, {str(wanted)[:12]}) than --model and "
            f"--pretrained ({hashes[0][:12]}). Use its own base model."
        )
