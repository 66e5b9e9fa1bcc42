"""Parts of all models: identity, image preprocessing, seeded building, and weights files read without running code."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from randlora_pl.utils.errors import UserError, brief, first_line
from randlora_pl.utils.image_spec import ImageSpec as ImageSpec

_SHOWN = 3


def modification_time(path: str) -> int | None:
    """Return the modification time of a weights file in nanoseconds; None if ``path`` is not a file."""
    file = Path(path).expanduser()
    return file.stat().st_mtime_ns if file.is_file() else None


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict with safetensors or ``torch.load(weights_only=True)``, depending on the file's content.

    A wrapping dict (``state_dict``, ``model`` ...) and the prefixes of DDP and torch.compile are removed. The tensors
    are on the CPU.

    Examples:
        >>> torch.save({"state_dict": {"module.weight": torch.zeros(2)}}, "weights.pt")
        >>> read_weights("weights.pt")
        {'weight': tensor([0., 0.])}

    Raises:
        UserError: The file is missing, damaged, contains code, or has no named tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"--model.pretrained: '{path}' {what}. Pass the path of a .safetensors or .pt file.")
    content = load_without_code(path)
    for key in ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(
            f"'{path}' is not a plain dict of named tensors. Save it with torch.save(model.state_dict(), PATH)."
        )
    names = list(content)
    for prefix in ("module.", "_orig_mod.", "module."):  # DDP, torch.compile, in either order
        if all(name.startswith(prefix) for name in names):
            names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, content.values(), strict=True))


def load_without_code(path: Path) -> Any:
    """Return what is in a safetensors file or one of ``torch.save``.

    Raises:
        UserError: The file is damaged, or contains code.
    """
    with path.open("rb") as stream:
        start = stream.read(9)
    try:
        if path.suffix == ".safetensors" or start[8:] == b"{":  # 8 bytes of length, then the JSON header
            return load_file(path)
        with warnings.catch_warnings():  # torch warns about archives that it then rejects
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"'{path}' is not a complete safetensors file ({error}). Download or copy it again.") from error
    except Exception as error:  # the restricted unpickler raises almost anything on a damaged file
        why = "is damaged or not a weights file. Download or copy it again."
        if "TorchScript" in str(error):
            why = (
                "is a TorchScript archive, which contains code (such as OpenAI's first files). "
                "Use the tag (--model.pretrained openai) or a .safetensors file of the same weights."
            )
        elif match := re.search(r"GLOBAL ([\w.]+)", str(error)):
            why = (
                f"is refused: it contains Python objects ({match[1]}) that could run code when loaded. "
                "If you trust it, save only its tensors: torch.save(model.state_dict(), PATH)."
            )
        raise UserError(f"'{path}' {why}") from error


def mismatch(what: str, message: str) -> str:
    """Shorten the text of PyTorch's ``load_state_dict`` error to at most three names of each kind."""
    shapes = r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\) from checkpoint, .*?torch\.Size\((\[.*?\])\)"
    kinds = {
        "of other shape": [
            f"{name} ({file} in the file, {model} in the model)" for name, file, model in re.findall(shapes, message)
        ]
    }
    for kind in ("missing", "unexpected"):
        match = re.search(rf"{kind.title()} key\(s\) in state_dict: (.*?)\. *(?:\n|$)", message)
        kinds[kind] = re.findall(r'"([^"]+)"', match[1]) if match else []
    parts = [
        f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}"
        for kind, names in kinds.items()
        if names
    ]
    return f"{what}: does not fit this architecture (tensors: {'; '.join(parts) or message.splitlines()[0]})."


def not_downloaded(what: str, error: Exception, url: str, options: str = "") -> UserError:
    """Return the error for weights that are neither cached nor downloadable, with the options to pass a file."""
    return UserError(
        f"The {what} are not in the cache and cannot be downloaded "
        f"({type(error).__name__}: {first_line(error)}; no network?). Get the file from {url} and pass it with "
        f"{options}--model.pretrained PATH, or use --model.pretrained random."
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Build models inside the block on the CPU, in fp32, as a pure function of ``seed``.

    The caller's random state, default device and default dtype are restored. Unlike with ``torch.manual_seed``, GPU
    generators are not changed.
    """
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Set modules to eval mode without gradients, and restore their modes after the block."""
    modes = [(module, module.training) for whole in modules for module in whole.modules()]
    for whole in modules:
        whole.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def quiet() -> Iterator[None]:
    """Silence open_clip's messages on the root logger (one per step of a build).

    ``logging.info`` would also install a root handler if none exists, which would print the application's log twice.
    Records of other loggers are not filtered.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    no_record = lambda record: False  # noqa: E731
    root.addHandler(handler)
    root.addFilter(no_record)
    try:
        yield
    finally:
        root.removeFilter(no_record)
        root.removeHandler(handler)


def check_size(name: str, size: int, patch: int) -> None:
    """Raise a `UserError` if an image size is not a positive multiple of the patch size, both in pixels."""
    if size < 1:
        raise UserError(f"{name}: the image size must be positive, not {size}.")
    if size % patch:
        low = max(1, size // patch) * patch
        raise UserError(
            f"{name} cuts images into patches of {patch} pixels: {size} is not a multiple. "
            f"Nearest sizes: {low} and {low + patch}."
        )


def patch_size(model: nn.Module) -> int:
    """Return the height of a timm model's patches in pixels; 1 for no patches or overlapping ones (PVT)."""
    embedding = getattr(model, "patch_embed", None)
    size, projection = getattr(embedding, "patch_size", 1), getattr(embedding, "proj", None)
    if isinstance(projection, nn.Conv2d) and projection.stride != projection.kernel_size:
        return 1
    return int(size[0] if isinstance(size, tuple) else size)


def set_gradient_checkpointing(model: nn.Module, enable: bool = True) -> None:
    """Recompute activations in the backward pass instead of keeping them, or keep them again.

    Examples:
        >>> set_gradient_checkpointing(load_vit("vit_tiny_patch16_224").model)

    Raises:
        UserError: The model does not support it, or ignores the setting.
    """
    if _checkpointing(model) == enable:
        return
    switch = getattr(model, "set_grad_checkpointing", None)
    if callable(switch):
        with quiet():
            switch(enable)
    if _checkpointing(model) != enable:  # some towers only warn, others ignore it
        raise UserError(
            f"{type(model).__name__} cannot switch gradient checkpointing {'on' if enable else 'off'}. "
            "Use --model.gradient_checkpointing false and a smaller --data.batch_size."
        )


def _checkpointing(model: nn.Module) -> bool:
    names = ("grad_checkpointing", "gradient_checkpointing")  # open_clip and timm; transformers
    return any(getattr(module, name, False) for module in model.modules() for name in names)


@dataclass(frozen=True)
class ModelIdentity:
    """Identity of a base model, sufficient to build it again and to reject adapters of other models.

    Attributes:
        library: ``"open_clip"``, ``"timm"`` or ``"transformers"``.
        name: Architecture, after correction (for instance ``ViT-B-32-quickgelu``), ``hf-hub:ORG/NAME``, or
            ``local-dir:NAME`` of a folder.
        pretrained: A tag, the name of a file, or ``"random"``.
        image_size: Height and width in pixels that the model was built for; only for image models.
        seed: Seed of the initialization; only for random weights.
        sha256: SHA-256 of the weights file, by which `weights_files` finds it; only for a file.
        config_sha256: SHA-256 of the configuration file; only for a folder or a repository of the Hub.
    """

    library: str
    name: str
    pretrained: str
    image_size: int | None = None
    seed: int | None = None
    sha256: str | None = None
    config_sha256: str | None = None

    def as_dict(self) -> dict[str, str | int]:
        """Return the fields that are not None, as JSON values."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def open_clip_spec(values: Mapping[str, Any], size: int, owner: str) -> ImageSpec:
    """Return the preprocessing that open_clip's ``image_transform_v2`` makes of a preprocessing configuration.

    Args:
        values: open_clip's ``preprocess_cfg`` or its entry of a tag; keys that are missing or None get its defaults.
        size: Height and width in pixels.
        owner: Name of the model, for messages.

    Raises:
        UserError: A value is unknown or impossible.
    """
    usual = ImageSpec()
    known = {key: value for key, value in values.items() if value is not None}
    mode = known.get("mode", "RGB")
    if mode != "RGB":
        raise UserError(f"{owner}: its preprocessing of images has the mode {brief(mode)}. Only RGB is supported.")
    interpolation, resize = known.get("interpolation", "bicubic"), known.get("resize_mode", "shortest")
    return ImageSpec(
        size,
        _three(known.get("mean", usual.mean)),
        _three(known.get("std", usual.std)),
        "bicubic" if interpolation == "random" else interpolation,  # as in open_clip, outside of training
        resize,
        fill=_three(known.get("fill_color", 0)) if resize == "longest" else usual.fill,
    ).checked(owner)


def timm_spec(values: Mapping[str, Any], size: int, owner: str) -> ImageSpec:
    """Return the preprocessing that ``timm.data.create_transform`` makes of a data configuration.

    Args:
        values: Result of ``timm.data.resolve_data_config``.
        size: Height and width in pixels.
        owner: Name of the model, for messages.

    Raises:
        UserError: A value is unknown or impossible.
    """
    mean, std, mode = _three(values["mean"]), _three(values["std"]), values["crop_mode"]
    resize = {"center": "shortest", "border": "longest"}.get(mode, mode) if isinstance(mode, str) else mode
    spec = ImageSpec(size, mean, std, values["interpolation"], resize, values["crop_pct"]).checked(owner)
    return spec if spec.resize != "longest" else spec.filled_with_mean()


def _three(value: Any) -> Any:
    """Return a color as a tuple; one number stands for three."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value, value)
