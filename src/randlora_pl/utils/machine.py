"""Facts about this machine: its cores, the folder of cached files, precisions of its devices, and packages for ONNX."""

import importlib.util
import os
from pathlib import Path
from typing import Any, Literal

import platformdirs

from randlora_pl.utils.errors import UserError, install


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """Return the folder of cached files: ``$RANDLORA_PL_CACHE``, or the system's user cache folder."""
    override = os.environ.get("RANDLORA_PL_CACHE")
    return Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("randlora-pl"))


Precision = Literal["32", "tf32", "bf16"]
"""float32; float32 with TF32 products on tensor cores; bfloat16 by autocast, as in training with ``bf16-mixed``."""


def use_precision(name: Precision, device: Any) -> Any:
    """Return the autocast context of a precision; ``tf32`` sets the products of the whole process instead.

    Raises:
        UserError: The device cannot do it.
    """
    import torch

    if name == "32":
        return torch.autocast(device.type, enabled=False)
    # The first GPUs with TF32 and bfloat16 have compute capability 8.0 (A100; RTX 30 is 8.6).
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    if name == "tf32" and (old or device.type != "cuda"):
        has = torch.cuda.get_device_name(device) if old else f"the device {device}"
        instead = "--precision 32" if old or device.type == "mps" else "--precision bf16 or 32"
        raise UserError(f"--precision tf32 needs an NVIDIA GPU from 2020 or later, and this is {has}. Use {instead}.")
    if name == "bf16" and (old or not torch.amp.is_autocast_available(device.type)):
        raise UserError(f"--precision bf16: {device} has no fast bfloat16. Use --precision 32.")
    if name == "tf32":
        torch.set_float32_matmul_precision("high")
    return torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16")


def check_onnx_packages() -> None:
    """Check that the packages of the extra ``onnx`` are installed.

    Raises:
        UserError: A package is missing.
    """
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise UserError(f"--to onnx needs {', '.join(missing)}. Use --to torch, or run: {install('onnx')}")
