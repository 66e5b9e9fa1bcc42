"""Liger-Kernel's norms, rotary angles and MLPs for decoders on a GPU, from an optional package."""

import importlib.util
from typing import Any

import torch

from randlora_pl.utils.errors import UserError


def use_liger(model: Any, device: torch.device) -> None:
    """Replace norms, rotary angles and activations of a new decoder by Liger's kernels, in place.

    The linear layers stay modules, so that they can be adapted afterwards. Liger's loss is not used: `token_losses`
    needs the loss of each token. Rotary angles are replaced for every model of this kind in the process.

    Args:
        model: A decoder of transformers without adapters.
        device: Device of the training.

    Raises:
        UserError: The package is missing, the device is not a CUDA device, or Liger does not know this kind of model.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError("--model.liger needs liger-kernel: pip install '.[liger]' in the checkout")
    if device.type != "cuda":
        raise UserError(f"--model.liger needs a CUDA device, and the model runs on {device.type}. Remove the option.")
    from liger_kernel.transformers import monkey_patch

    kind = model.config.model_type
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"--model.liger: Liger-Kernel has no kernels for {kind}. Remove the option.")
    monkey_patch._apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
