"""``adapter merge`` and ``adapter add``: weights for open_clip or timm that include updates, and sums of updates."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from randlora_pl.commands.adapter.export import print_converted
from randlora_pl.commands.common.terminal import check_output
from randlora_pl.run.options.adapter_config import check_adapter
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import refuse_inputs
from randlora_pl.utils.options import Adapter, File, Finite, Overwrite, Weights, check_rank_or_error
from randlora_pl.utils.weights_files import register_weights

if TYPE_CHECKING:
    from randlora_pl.interop.merge import Written


def merge(
    adapter: Adapter,
    *,
    output: File,
    scale: Annotated[float, Finite] = 1.0,
    head: bool = True,
    overwrite: Overwrite = False,
    pretrained: Weights = (),
) -> int:
    """Write the whole model with the update merged into its weights, as a state dict for open_clip or timm.

    The output is loaded without this program and compared on random images before it gets its final name.

    Examples:
        randlora-pl adapter merge ADAPTER --output model.safetensors
        randlora-pl adapter merge ADAPTER --scale 0.5 --output half.pt

    Args:
        output: .safetensors (with class names, prompts and image size in its metadata) or .pt
        scale: W0 + S (W - W0): 0 is the base model, 1 the tuned model; any number works, as in WiSE-FT
        head: Omit the linear head (timm) or the file of class embeddings (open_clip)

    Note:
        For a language model, --output is a folder in the format of transformers, with its tokenizer.

        A CLIP model is written with its text tower. Its class embeddings are in FILE.head.safetensors. A timm model is
        written with its linear head as classifier. The model tiny, which open_clip does not know, is described in
        FILE.json.
    """
    register_weights(pretrained)
    check_adapter(adapter)
    from randlora_pl.adapters import read_adapter
    from randlora_pl.interop import base_model, prompts
    from randlora_pl.interop import merge as merging

    file = read_adapter(adapter)
    file.adapter.require_matrix("the merge", file.path)  # before a large model is built
    prompts.check_merge(file, scale)
    if file.config.get("base_model", {}).get("library") == "transformers":
        kind, size, gap = merging.write_merged(file, output, scale, overwrite)
        print(f"{output}: {size:,} bytes, a folder for transformers")
        print(f"largest difference of logits, loaded by transformers alone, on random tokens: {gap:.1e}")
        print(f"  {kind}.from_pretrained({str(output)!r})")
        return 0
    merging.check_output(output, [adapter], overwrite)
    written = merging.write(output, merging.merged(base_model.load_base(file), file, scale, head), overwrite)
    which = {0.0: "the base model's weights, unchanged", 1.0: "the tuned weights"}
    print(f"scale {scale:g}: {which.get(scale, f'W0 + {scale:g} (W - W0) in every tuned tensor')}")
    print_written(written)
    return 0


def print_written(written: "Written") -> None:
    """Print files, sizes, the largest difference, and how to load the files."""
    for file, size in written.sizes.items():
        print(f"{file}: {size:,} bytes")
    print(f"largest difference of outputs, loaded by the bare library, on random images: {written.difference:.1e}")
    for note in written.notes:
        print(note)
    for line in written.load:
        print(f"  {line}")


def add(
    adapters: Sequence[Adapter],
    *,
    output: Path,
    weights: Sequence[Annotated[float, Finite]] = (),
    as_: Literal["merged", "lora"] = "merged",
    rank: int | None = None,
    error: float | None = None,
    head: int = 1,
    overwrite: Overwrite = False,
    pretrained: Weights = (),
) -> int:
    """Add a weighted sum of the updates of several adapters to their base model (task arithmetic).

    Methods, ranks and seeds can differ, but all must have the same base model. Updates are added up exactly and rounded
    once.

    Examples:
        randlora-pl adapter add A B --weights 0.5 0.5 --output sum.safetensors
        randlora-pl adapter add A B --as lora --rank 16 --output SUM

    Args:
        output: File or folder to write
        weights: One number per adapter, which can be negative (default: 1)
        as_: merged: weights for open_clip or timm, as adapter merge writes them. lora: a LoRA adapter, by truncated
            singular value decomposition of each sum
        rank: lora: rank of every layer, or
        error: lora: largest relative error per layer (Frobenius), which selects the rank
        head: Adapter whose head and class names are used, by its place
    """
    register_weights(pretrained)
    count = len(adapters)
    weights = weights or [1.0] * count
    if len(weights) != count:
        raise UserError(f"adapter add: {len(weights)} --weights for {count} adapters; give one per adapter.")
    if not 1 <= head <= count:
        raise UserError(f"adapter add: --head is {head}; give a number from 1 to {count}, the adapter's place.")
    if as_ == "merged" and (rank is not None or error is not None):
        raise UserError("adapter add: --rank and --error need --as lora.")
    if as_ != "merged":
        check_rank_or_error(rank, error)
    for path in adapters:
        check_adapter(path)
    from randlora_pl.adapters import read_adapter
    from randlora_pl.interop import base_model, low_rank, merge, prompts, updates

    if as_ == "merged":
        merge.check_output(output, adapters, overwrite)
    else:
        refuse_inputs([output], adapters)
        check_output(output, overwrite)
    files = [read_adapter(path) for path in adapters]
    for file in files:
        file.adapter.require_matrix("the sum", file.path)
        base_model.refuse_texts(file, "have their updates added up")
        prompts.check_no_prompts(file, "they belong to one update, so sums have none. Predict with each of them")
    base_model.same_base(files)
    first = files[head - 1]
    base = base_model.load_base(first)
    total = updates.weighted_sum([updates.updates(base, file) for file in files], weights)
    for file, weight in zip(files, weights, strict=True):
        print(f"{weight:g} x {file.path} ({file.adapter.method()})")
    if as_ == "merged":
        print_written(merge.write(output, merge.added(base, first, total), overwrite))
        return 0
    origin = {
        "adapters": [low_rank.label(file) for file in files],
        "methods": [file.adapter.method() for file in files],
        "weights": list(weights),
    }
    made = low_rank.write_lora(output, base, total, files, first, rank=rank, error=error, origin=origin)
    print_converted(output, made, first)
    return 0
