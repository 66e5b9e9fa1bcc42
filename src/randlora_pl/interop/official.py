"""Vision checkpoints of RandLoRA's official code: PyTorch files with the state of trainable parameters.

Each adapted weight has ``<weight>_w_loramat_B`` (n, r), our lambda, and ``<weight>_w_loramat_A`` (n, d), our gamma.
The file also has ``basis``, the pair B (count, D, r) and A (1, r, d) at the largest sizes, and ``seed``. There are
d // r + 1 bases, one more than in PEFT if r divides d; columns and rows are paired as in PEFT. The file does not have
the scaling: the code's default is 1 / r.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from randlora_pl.adapters.methods import randlora
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.interop.external import ExternalAdapter, sites_by_name
from randlora_pl.models.weights import load_without_code
from randlora_pl.utils.errors import UserError

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
    translate(path, model, alpha).inject(model)
    return model


def translate(path: str | os.PathLike[str], model: nn.Module, alpha: float = 1.0) -> ExternalAdapter:
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
    foreign = ExternalAdapter(
        str(path), method, layers, Bases(seed, a, b[:most], stored=True)
    )  # the file has 1,000 bases, most unused
    foreign.check(model)
    return foreign


def _read(path: Path) -> Mapping[str, Any]:
    """Read the state in a file without running code.

    Raises:
        UserError: The file is missing, damaged, or has other objects than tensors.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file. Pass the checkpoint written by the official code.")
    state = load_without_code(path)
    if isinstance(state, Mapping) and isinstance(inner := state.get("state_dict"), Mapping):
        state = {**inner, **{name: state[name] for name in ("basis", "seed") if name in state}}
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, not the state of a model.")
    state = {str(name): value for name, value in state.items()}
    ours = [name for name in state if name.endswith((_LAMBDA, _GAMMA))]
    if wrong := [name for name in ours if not _is_matrix(state[name])]:
        raise UserError(f"{path}: {wrong[0]} is not a matrix of numbers; it is damaged, copy it again.")
    return state


def _is_matrix(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()


def _layer(weight: str, layers: list[str], source: str, model: str) -> str:
    """Return our layer for a name in the file.

    The code wraps the model, so names may have the wrapper's prefix; dots and underscores are equivalent.

    Raises:
        UserError: No layer matches, or several do.
    """
    plain = re.sub(r"[._]+", "_", weight).strip("_")
    plain = re.sub(r"_(?:in_proj_weight|in_proj|weight)$", "", plain)

    def ends(layer: str) -> bool:
        own = re.sub(r"[._]+", "_", layer.removesuffix(".in_proj"))
        return f"_{plain}".endswith(f"_{own}") or f"_{own}".endswith(f"_{plain}")

    exact = [layer for layer in layers if re.sub(r"[._]+", "_", layer.removesuffix(".in_proj")) == plain]
    found = exact or [layer for layer in layers if ends(layer)]
    if len(found) > 1:  # `transformer...` of the text tower also ends `visual.transformer...`
        longest = max(len(layer.removesuffix(".in_proj")) for layer in found)
        found = [layer for layer in found if len(layer.removesuffix(".in_proj")) == longest]
    if len(found) != 1:
        what = "does not exist" if not found else f"may be {' or '.join(found[:2])}"
        raise UserError(f"{source}: its target {weight.rstrip('._')} {what} in this model ({model}).")
    return found[0]
