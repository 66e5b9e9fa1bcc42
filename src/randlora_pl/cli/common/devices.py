"""The device of commands that use a trained model."""

from typing import Any

from randlora_pl.utils.errors import UserError


def pick_device(name: str) -> Any:
    """Return a device of this machine; ``auto`` selects the fastest one, others are refused if they do not exist."""
    import torch

    there = ["cuda"] if torch.cuda.is_available() else []
    there += ["mps"] if torch.backends.mps.is_available() else []
    there += ["cpu"]
    if name == "auto":
        return torch.device(there[0])
    if name.partition(":")[0] not in there:
        raise UserError(f"--device {name} is not on this machine; there is {', '.join(there)}.")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device: give cpu, cuda, cuda:1 and so on.") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise UserError(f"--device {name} is not on this machine; the last one is {device.type}:{count - 1}.")
    return device
