"""``adapter add``: weighted sums of the updates of several adapters on one base model."""

import argparse
import math
from pathlib import Path

from randlora_pl.commands.common.arguments import CommandParser, check_output
from randlora_pl.run.options.adapter_config import check_adapter
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import refuse_inputs
from randlora_pl.utils.files.run_files import find_adapter
from randlora_pl.utils.rank_or_error import check_rank_or_error

PAGE = """\
Add a weighted sum of the updates of several adapters to their base model (task arithmetic). Methods, ranks and seeds
can differ, but all must have the same base model. Updates are added up exactly and rounded once.

  randlora-pl adapter add A B --weights 0.5 0.5 --output sum.safetensors
  randlora-pl adapter add A B --as lora --rank 16 --output SUM

  --output PATH    File or folder to write
  --weights W ...  One number per adapter, which can be negative (default: 1)
  --as FORM        merged: weights for open_clip or timm, as adapter merge writes them (default: merged)
                   lora: a LoRA adapter, by truncated singular value decomposition of each sum
  --rank K         lora: rank of every layer, or
  --error E        lora: largest relative error per layer (Frobenius), which selects the rank
  --head N         Adapter whose head and class names are used (default: 1, the first)
  --overwrite      Replace the output if it exists
  --pretrained FILE  Weights file of a base model that this machine does not have
"""


def _parse(args: list[str]) -> argparse.Namespace:
    parser = CommandParser("adapter add")
    parser.add_argument("adapters", type=find_adapter, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--as", dest="form", choices=("merged", "lora"), default="merged")
    parser.add_options(weights=[float], rank=int, error=float, head=1, overwrite=False)
    parser.add_weights()
    options = parser.parse_args(args)
    count = len(options.adapters)
    options.weights = options.weights or [1.0] * count
    if len(options.weights) != count:
        raise UserError(f"adapter add: {len(options.weights)} --weights for {count} adapters; give one per adapter.")
    if not all(map(math.isfinite, options.weights)):
        raise UserError(f"adapter add: --weights are {options.weights}; give plain numbers.")
    if not 1 <= options.head <= count:
        raise UserError(f"adapter add: --head is {options.head}; give a number from 1 to {count}, the adapter's place.")
    if options.form == "merged" and (options.rank is not None or options.error is not None):
        raise UserError("adapter add: --rank and --error need --as lora.")
    if options.form != "merged":
        check_rank_or_error(options.rank, options.error)
    return options


def add_verb(args: list[str]) -> int:
    """Check the options, add the updates, write and compare."""
    options = _parse(args)
    for path in options.adapters:
        check_adapter(path)
    from randlora_pl.adapters import read_adapter
    from randlora_pl.adapters.input_dependent import check_fixed
    from randlora_pl.commands.adapter.export_lora import print_converted
    from randlora_pl.commands.adapter.merge import print_written
    from randlora_pl.interop.base_model import load_base, refuse_texts, same_base
    from randlora_pl.interop.low_rank import label, write_lora
    from randlora_pl.interop.merge.vision import added, write
    from randlora_pl.interop.merge.vision import check_output as check_merged
    from randlora_pl.interop.prompts import check_no_prompts
    from randlora_pl.interop.updates import updates, weighted_sum

    if options.form == "merged":
        check_merged(options.output, options.adapters, options.overwrite)
    else:
        refuse_inputs([options.output], options.adapters)
        check_output(options.output, options.overwrite)
    files = [read_adapter(path) for path in options.adapters]
    for file in files:
        check_fixed(file.adapter, file.path)
        refuse_texts(file, "have their updates added up")
        check_no_prompts(file, "they belong to one update, so sums have none. Predict with each of them")
    same_base(files)
    first = files[options.head - 1]
    base = load_base(first)
    total = weighted_sum([updates(base, file) for file in files], options.weights)
    for file, weight in zip(files, options.weights, strict=True):
        print(f"{weight:g} x {file.path} ({file.adapter.method()})")
    if options.form == "merged":
        print_written(write(options.output, added(base, first, total), options.overwrite))
        return 0
    origin = {
        "adapters": [label(file) for file in files],
        "methods": [file.adapter.method() for file in files],
        "weights": options.weights,
    }
    made = write_lora(options.output, base, total, files, first, rank=options.rank, error=options.error, origin=origin)
    print_converted(options.output, made, first)
    return 0
