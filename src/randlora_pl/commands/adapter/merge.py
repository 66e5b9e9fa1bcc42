"""``adapter merge``: weights for open_clip or timm that include the update."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from randlora_pl.commands.common.arguments import CommandParser
from randlora_pl.run.options.adapter_config import check_adapter
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.run_files import find_adapter

if TYPE_CHECKING:
    from randlora_pl.interop.merge.vision import Written

PAGE = """\
Write the whole model with the update merged into its weights, as a state dict for open_clip or timm. The output is
loaded without this program and compared on random images before it gets its final name.

  randlora-pl adapter merge ADAPTER --output model.safetensors
  randlora-pl adapter merge ADAPTER --scale 0.5 --output half.pt

  --output FILE    .safetensors (with class names, prompts and image size in its metadata) or .pt
  --scale S        W0 + S (W - W0): 0 is the base model, 1 the tuned model; any number works, as in WiSE-FT (default: 1)
  --no-head        Omit the linear head (timm) or the file of class embeddings (open_clip)
  --overwrite      Replace the output if it exists
  --pretrained FILE  Weights file of a base model that this machine does not have

For a language model, --output is a folder in the format of transformers, with its tokenizer.

A CLIP model is written with its text tower. Its class embeddings are in FILE.head.safetensors. A timm model is written
with its linear head as classifier. The model tiny, which open_clip does not know, is described in FILE.json.
"""


def _parse(args: list[str]) -> argparse.Namespace:
    parser = CommandParser("adapter merge")
    parser.add_argument("adapter", type=find_adapter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--no-head", "--no_head", dest="head", action="store_false")
    parser.add_options(scale=1.0, overwrite=False)
    parser.add_weights()
    options = parser.parse_args(args)
    if not math.isfinite(options.scale):
        raise UserError(f"--scale is {options.scale}: give a number, 0 for the base model, 1 for the tuned one.")
    return options


def merge_verb(args: list[str]) -> int:
    """Check the options, merge, write and compare."""
    options = _parse(args)
    check_adapter(options.adapter)
    from randlora_pl.adapters import read_adapter
    from randlora_pl.adapters.input_dependent import check_fixed
    from randlora_pl.interop.base_model import load_base
    from randlora_pl.interop.merge.vision import check_output, merged, write
    from randlora_pl.interop.prompts import check_merge

    file = read_adapter(options.adapter)
    check_fixed(file.adapter, file.path)  # before a large model is built
    check_merge(file, options.scale)
    if file.config.get("base_model", {}).get("library") == "transformers":
        from randlora_pl.interop.merge.language import write_merged

        kind, size, gap = write_merged(file, options.output, options.scale, options.overwrite)
        print(f"{options.output}: {size:,} bytes, a folder for transformers")
        print(f"largest difference of logits, loaded by transformers alone, on random tokens: {gap:.1e}")
        print(f"  {kind}.from_pretrained({str(options.output)!r})")
        return 0
    check_output(options.output, [options.adapter], options.overwrite)
    base = load_base(file)
    written = write(options.output, merged(base, file, options.scale, options.head), options.overwrite)
    which = {0.0: "the base model's weights, unchanged", 1.0: "the tuned weights"}
    print(
        f"scale {options.scale:g}: {which.get(options.scale, f'W0 + {options.scale:g} (W - W0) in every tuned tensor')}"
    )
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
