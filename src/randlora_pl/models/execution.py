"""Execution of a backbone: dtype of its frozen matrices, and compiled blocks."""

import os
import shutil

import torch
from torch import nn

from randlora_pl.models.blocks import repeated_blocks
from randlora_pl.utils.errors import UserError, near

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Modes of ``torch.compile``, all of inductor."""
GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes that replay CUDA graphs, whose results live until the next step."""
_VARIANTS = 64


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> int:
    """Cast the frozen matrices of linear, attention and convolution layers in place, and their frozen biases.

    Autocast would cast them for every product, again in each step. Embeddings, norms and trainable parameters keep
    their dtype.

    Examples:
        >>> clip = load_clip("tiny")
        >>> report = inject(clip.model, RandLoRA(rank=6))
        >>> cast_frozen(clip.model, torch.bfloat16)
        41

    Returns:
        Number of matrices that were cast.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.MultiheadAttention | nn.Conv2d):
            own = [parameter for parameter in module.parameters(recurse=False) if not parameter.requires_grad]
            if all(parameter.is_floating_point() for parameter in own):  # quantized weights are packed integers
                for parameter in own:
                    parameter.data = parameter.data.to(dtype)
                    count += parameter.dim() > 1
    return count


def compile_blocks(model: nn.Module, how: str, device: torch.device) -> None:
    """Compile each repeated block with ``torch.compile``, in place; names, references and hooks stay.

    Blocks of one class share the compiled code, so that compile time does not grow with depth. A compiled block keeps
    for its backward pass the tensors that ``memory: low`` of RandLoRA would rebuild. Dynamo's recompile limit is raised
    for the whole process.

    Examples:
        >>> compile_blocks(load_clip("tiny").model, "max-autotune", torch.device("cpu"))  # at the first use

    Args:
        model: A backbone.
        how: One of `MODES`, or a backend.
        device: Device of the first use.

    Raises:
        UserError: The mode or backend is unknown, the model has no repeated blocks, or a required C++ compiler is
            missing.
    """
    backend = "inductor" if how in MODES else how
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        known = [*MODES, *torch.compiler.list_backends()]
        raise UserError(
            f"--model.torch_compile {how} is unknown. Set true, false, a mode or a backend.{near(how, known)} "
            f"Known: {', '.join(known)}"
        )
    compilers = (os.environ.get("CXX", ""), "g++", "clang++", "cl")
    if backend == "inductor" and device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError("--model.torch_compile needs a C++ compiler on a CPU. Install g++, or remove the option.")
    blocks = repeated_blocks(model)
    if not blocks:
        raise UserError(f"--model.torch_compile finds no repeated blocks in {type(model).__name__}. Remove the option.")
    import torch._dynamo.config as dynamo  # takes a second to import

    # Two tower widths, training and evaluation, and a smaller last batch exceed the default limit of 8 variants.
    dynamo.recompile_limit = max(_VARIANTS, dynamo.recompile_limit)
    for block in blocks.values():
        block.compile(backend=backend, mode=how if how in MODES else None)
