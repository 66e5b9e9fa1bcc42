"""What is needed beside PyTorch."""

import importlib.util

from randlora_pl.utils.errors import UserError

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_packages() -> None:
    """Refuses to go on without the packages of the extra.

    Raises:
        UserError: One is missing.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--to onnx needs {', '.join(missing)}, not installed here: pip install 'randlora-pl[onnx]'. "
            "--to torch needs no more than PyTorch."
        )
