"""Reading of weights files without running code, with errors that the user can act on."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from randlora_pl.utils.errors import UserError, first_line

_WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema")
_PREFIXES = ("module.", "_orig_mod.", "module.")  # DDP, torch.compile, in either order
_SHOWN = 3


def changed(path: str) -> int | None:
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
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(
            f"'{path}' is not a plain dict of named tensors. Save it with torch.save(model.state_dict(), PATH)."
        )
    names = list(content)
    for prefix in _PREFIXES:
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
        raise UserError(_refusal(path, str(error))) from error


def _refusal(path: Path, message: str) -> str:
    """Return the message for a file that ``torch.load(weights_only=True)`` rejected."""
    if "TorchScript" in message:
        return (
            f"'{path}' is a TorchScript archive, which contains code (such as OpenAI's first files). "
            "Use the tag (--model.pretrained openai) or a .safetensors file of the same weights."
        )
    if found := re.search(r"GLOBAL ([\w.]+)", message):
        return (
            f"'{path}' is refused: it contains Python objects ({found[1]}) that could run code when loaded. "
            "If you trust it, save only its tensors: torch.save(model.state_dict(), PATH)."
        )
    return f"'{path}' is damaged or not a weights file. Download or copy it again."


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load every tensor of a model; its dtype and device stay. ``what`` begins the error message.

    Raises:
        UserError: Tensors are missing, unexpected or of another shape (at most three of each are named).
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(mismatch(what, str(error))) from error


def mismatch(what: str, message: str) -> str:
    """Shorten the text of PyTorch's ``load_state_dict`` error to at most three names of each kind."""
    shapes = r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\) from checkpoint, .*?torch\.Size\((\[.*?\])\)"
    kinds = {
        "of other shape": [
            f"{name} ({file} in the file, {model} in the model)" for name, file, model in re.findall(shapes, message)
        ],
        "missing": _listed(r"Missing key\(s\) in state_dict: (.*?)\. *(?:\n|$)", message),
        "unexpected": _listed(r"Unexpected key\(s\) in state_dict: (.*?)\. *(?:\n|$)", message),
    }
    parts = [
        f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}"
        for kind, names in kinds.items()
        if names
    ]
    return f"{what}: not of this architecture (tensors: {'; '.join(parts) or message.splitlines()[0]})."


def not_downloaded(what: str, error: Exception, url: str, options: str = "") -> UserError:
    """Return the error for weights that are neither cached nor downloadable, with the options to pass a file."""
    return UserError(
        f"The {what} are not in the cache and cannot be downloaded "
        f"({type(error).__name__}: {first_line(error)}; no network?). Get the file from {url} and pass it with "
        f"{options}--model.pretrained PATH, or use --model.pretrained random."
    )


def _listed(pattern: str, message: str) -> list[str]:
    found = re.search(pattern, message)
    return re.findall(r'"([^"]+)"', found[1]) if found else []
