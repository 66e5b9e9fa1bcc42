"""Export to ONNX and to PyTorch programs."""

import importlib.util

from randlora_pl.utils.errors import UserError


def check_packages() -> None:
    """Check that the packages of the extra are installed.

    Raises:
        UserError: A package is missing.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--to onnx needs {', '.join(missing)}, not installed here. Run: pip install '.[onnx]' in the checkout. "
            "--to torch needs only PyTorch."
        )
