"""How a backbone runs: the dtype of its frozen matrices, and blocks that are compiled."""

import os
import shutil

import torch
from torch import nn

from randlora_pl.models.blocks import repeated_blocks
from randlora_pl.utils.errors import UserError, near

_VARIANTS = 64


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> int:
    """Keeps the frozen matrices of linear, attention and convolution layers in another dtype, in place.

    Autocast would cast them to it for every product anyway, again in each step. Embeddings, norms and biases, which
    are added and not multiplied, stay as they are, and so does what trains.

    Args:
        model: The backbone, with or without an adapter.
        dtype: The dtype of the products, ``torch.bfloat16`` under autocast.

    Returns:
        How many matrices there were.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.MultiheadAttention | nn.Conv2d):
            for parameter in module.parameters(recurse=False):
                frozen = parameter.dim() > 1 and not parameter.requires_grad
                if frozen and parameter.is_floating_point():  # quantised weights are packed integers
                    parameter.data = parameter.data.to(dtype)
                    count += 1
    return count


def compile_blocks(model: nn.Module, backend: str, device: torch.device) -> None:
    """Lets ``torch.compile`` compile each repeated block, in place; names, references and hooks stay as they are.

    Blocks of one class share what is compiled, so that a deep model takes no longer than a shallow one. A compiled
    block keeps for its backward pass what ``memory: low`` of RandLoRA would build again. Dynamo's limit of variants is
    raised for the whole process.

    Args:
        model: The backbone, with or without an adapter.
        backend: A backend of ``torch.compile``, such as ``inductor``.
        device: Where the model will run.

    Raises:
        UserError: There is no such backend, no block, or no C++ compiler where one is needed.
    """
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        known = torch.compiler.list_backends()
        raise UserError(
            f"--model.torch_compile {backend}: give true, false, or a backend.{near(backend, known)} "
            f"Known: {', '.join(known)}"
        )
    compilers = (os.environ.get("CXX", ""), "g++", "clang++", "cl")
    if backend == "inductor" and device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError(
            "--model.torch_compile needs a C++ compiler on a CPU, and there is none: install g++, or leave it out."
        )
    blocks = repeated_blocks(model)
    if not blocks:
        raise UserError(
            f"--model.torch_compile finds no repeated blocks in {type(model).__name__} to compile: leave it out."
        )
    import torch._dynamo.config as dynamo  # here, because it takes a second

    # Towers of two widths, training and evaluation, a smaller last batch: more variants than the limit of 8.
    limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"  # before PyTorch 2.6
    setattr(dynamo, limit, max(_VARIANTS, getattr(dynamo, limit)))
    for block in blocks.values():
        block.compile(backend=backend)
