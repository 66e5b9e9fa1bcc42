"""``adapter export``: an adapter in the form of another system, each form in a module of its own."""

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from randlora_pl.commands.common.arguments import CommandParser, check_output, spelled
from randlora_pl.run.options.adapter_config import check_adapter
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.files.atomic_output import refuse_inputs
from randlora_pl.utils.files.run_files import find_adapter

PAGE = """\
Convert an adapter to another format. The output is read again and compared before it gets its final name.

  randlora-pl adapter export ADAPTER --to peft --output DIR
  randlora-pl adapter export ADAPTER --to lora --error 0.05 --output DIR
  randlora-pl adapter export ADAPTER --to onnx --output model.onnx

  --to peft        A folder for PeftModel.from_pretrained: RandLoRA, LoRA, AdaLoRA, VeRA, DoRA, PiSSA, LoRA-XS, HiRA,
                   SHiRA, OFT on linear layers
  --to lora        A plain LoRA adapter, by truncated singular value decomposition of each update
  --to onnx        The merged model as an ONNX file with class names (pip install '.[onnx]' in the checkout)
  --to torch       The merged model as a torch.export program (.pt2)
  --to adapter     Our own format in another dtype, as a folder or one .safetensors file
  --output PATH    File or folder to write
  --overwrite      Replace the output if it exists
  --pretrained FILE  Weights file of a base model that this machine does not have

  peft:            --peft-type ADALORA  Keep an AdaLoRA what it is (default: a LoRA of the ranks that are left)
  lora:            --rank K      Rank of every layer, or
                   --error E     Largest relative error per layer (Frobenius), which selects the rank
  onnx, torch:     --part PART   classifier, image (image features) or text (of token ids) (default: classifier)
  adapter:         --dtype TYPE  float32, bfloat16 or float16
"""

FORMS = {
    "peft": "adapter.export_peft",
    "lora": "adapter.export_lora",
    "onnx": "adapter.export_onnx",
    "torch": "adapter.export_onnx",
    "adapter": "adapter.export",
}
"""The module of each form; its ``export`` takes the options."""

_OPTIONS = {
    "rank": ("lora",),
    "error": ("lora",),
    "part": ("onnx", "torch"),
    "dtype": ("adapter",),
    "peft_type": ("peft",),
}


def _parse(args: list[str]) -> argparse.Namespace:
    parser = CommandParser("adapter export")
    parser.add_argument("adapter", type=find_adapter)
    parser.add_argument("--to", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_weights()
    parser.add_options(overwrite=False, rank=int, error=float, part=("classifier", "image", "text"))
    parser.add_options(dtype=("float32", "bfloat16", "float16"), peft_type=("ADALORA",))
    options = parser.parse_args(args)
    if options.to not in FORMS:
        raise UserError(
            f"adapter export: unknown --to {options.to!r}.{near(options.to, FORMS)} Use one of {', '.join(FORMS)}.",
            "For weights of open_clip, timm or transformers: randlora-pl adapter merge --help",
        )
    for name, forms in _OPTIONS.items():
        if getattr(options, name) is not None and options.to not in forms:
            allowed = " or ".join(forms)
            raise UserError(f"adapter export: {spelled(name)} belongs to --to {allowed}, not to --to {options.to}.")
    return options


def export_verb(args: list[str]) -> int:
    """Check the options, and write the requested form."""
    options = _parse(args)
    check_output(options.output, options.overwrite)
    check_adapter(options.adapter)
    refuse_inputs([options.output], [options.adapter])
    write: Callable[[argparse.Namespace], int] = import_module(f"randlora_pl.commands.{FORMS[options.to]}").export
    return write(options)


def export(options: argparse.Namespace) -> int:
    """Write our own format again, in another dtype or shape."""
    from randlora_pl.adapters.io.save_load import DTYPES, copy_adapter

    size = copy_adapter(options.adapter, options.output, DTYPES.get(options.dtype))
    print(f"{options.output}: {size:,} bytes")
    return 0
