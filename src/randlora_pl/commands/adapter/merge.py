"""``adapter merge``: weights for open_clip or timm that include the update."""

from typing import TYPE_CHECKING, Annotated

from randlora_pl.run.options.adapter_config import check_adapter
from randlora_pl.utils.files.weights_files import register_weights
from randlora_pl.utils.option_types import Adapter, File, Overwrite, Weights
from randlora_pl.utils.options import Finite

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
