"""``adapter import``: an adapter of PEFT or of the official code as one of ours."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from randlora_pl.commands.common.arguments import CommandParser, check_output, spelled
from randlora_pl.utils.errors import UserError, brief, near

if TYPE_CHECKING:
    from torch.nn import Module

    from randlora_pl.interop.base_model import Base
    from randlora_pl.interop.foreign.adapter import ExternalAdapter

PAGE = """\
Convert an adapter of another program to ours. If peft is installed, the outputs are compared with PEFT's.

  randlora-pl adapter import DIR --from peft --model vit_base_patch16_224 --pretrained timm --output adapter
  randlora-pl adapter import FILE --from official --model ViT-B-32 --pretrained openai --output adapter

  --from SOURCE      peft      a folder of save_pretrained: RandLoRA (also without its bases), LoRA, DoRA, PiSSA, VeRA,
                               HiRA, SHiRA, OFT
                     official  a checkpoint of the vision code of RandLoRA's authors
  --model NAME       Base model: a name of timm or open_clip, or of a language model (see --task). Default for PEFT: the
                     model that the adapter names
  --pretrained TAG   Its weights: timm, a tag, a file, or random. For a language model a folder, or nothing
  --output PATH      Folder or .safetensors file to write
  --overwrite        Replace the output if it exists

  --classnames FILE  One class per line, so that the adapter can predict. Prompts of a text head: "a photo of a {}."
  --task TASK        LinearHeadTask, TextHeadTask, VisionLanguageTask, or CausalLMTask for a decoder of transformers
                     (default: CausalLMTask for task_type CAUSAL_LM, LinearHeadTask for an adapter with a head)
  --bases-dtype TYPE peft without bases: bfloat16, or float16 if PEFT trained without bfloat16 (default: bfloat16)
  --alpha A          official: the updates are scaled by A / r, which the file does not store (default: 1)
"""

DECODER = "CausalLMTask"
TASKS = ("LinearHeadTask", "TextHeadTask", "VisionLanguageTask", DECODER)


def _parse(args: list[str]) -> argparse.Namespace:
    parser = CommandParser("adapter import")
    parser.add_argument("path", type=Path)
    parser.add_argument("--from", dest="source", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_options(overwrite=False, model=str, pretrained=str, classnames=Path, task=TASKS, alpha=float)
    parser.add_options(bases_dtype=("bfloat16", "float16"))
    options = parser.parse_args(args)
    sources = ("peft", "official")
    if options.source not in sources:
        raise UserError(
            f"adapter import: --from is {options.source!r}.{near(options.source, sources)} Use peft or official."
        )
    for name, source in (("bases_dtype", "peft"), ("alpha", "official")):
        if getattr(options, name) is not None and options.source != source:
            raise UserError(f"adapter import: {spelled(name)} belongs to --from {source}.")
    if not options.path.exists():
        raise UserError(f"{options.path} does not exist; give a folder of PEFT's, or a checkpoint file.")
    return options


def import_verb(args: list[str]) -> int:
    """Check the options, convert the adapter, compare, and write it."""
    options = _parse(args)
    check_output(options.output, options.overwrite)
    print(convert(options, str(options.path)))
    return 0


def convert(options: argparse.Namespace, name: str) -> str:
    """Convert an adapter, print the comparison, and write it; return the next command.

    Args:
        options: The options of ``adapter import``.
        name: The adapter in messages.
    """
    import torch

    from randlora_pl.interop import base_model
    from randlora_pl.interop.foreign import official
    from randlora_pl.interop.imported import ImportPlan, check_base, load_decoder
    from randlora_pl.interop.peft import files as peft_files
    from randlora_pl.interop.peft import import_ as peft_import

    adapter = peft_files.read(options.path, name) if options.source == "peft" else None
    if options.model is None:
        found = None if adapter is None else peft_files.named_base(adapter)
        if found is None:
            given = None if adapter is None else adapter.config.get("base_model_name_or_path")
            hint = f" Its config names {brief(given)}." if given else ""
            folder = name if name == str(options.path) else "DIR"
            download = "" if folder == name else f"hf download {name} --local-dir DIR, then "
            raise UserError(
                f"The base model of {name} is not known.{hint} Name it by --model: {download}randlora-pl adapter "
                f"import {folder} --from {options.source} --model NAME --pretrained TAG --output ADAPTER"
            )
        options.model, options.pretrained = found[0], options.pretrained or found[1]
    trained = {} if adapter is None else adapter.task.get("arguments", {})  # of an adapter exported here
    written = adapter is not None and adapter.config.get("task_type") == "CAUSAL_LM" and options.task is None
    arguments: dict[str, Any] = {}  # of a decoder's task
    if options.task == DECODER or written:
        base, arguments = load_decoder(options.model, options.pretrained, trained)
    else:
        base = base_model.named(options.model, options.pretrained, trained.get("seed", 0), trained.get("img_size"))
    if adapter is not None:
        check_base(adapter, base)
        dtype = getattr(torch, options.bases_dtype or "bfloat16")
        foreign = peft_import.translate(adapter, base.model, dtype)
    else:
        foreign = official.translate(options.path, base.model, 1.0 if options.alpha is None else options.alpha)
    if owned := foreign.owned(base.model):
        raise UserError(
            f"{name}: {next(iter(owned))} was trained as a whole, which no task supports. Import it in Python: "
            "save_adapter(import_peft(PATH, model), OUTPUT)"
        )
    classnames = _lines(options.classnames) if options.classnames else []
    if arguments:
        plan = ImportPlan(foreign, base, DECODER, arguments=arguments)
    else:
        plan = ImportPlan.make(foreign, base, adapter, options.task, classnames)
    ours = base.copy().model
    print(foreign.inject(ours))
    print(_compared(options, name, foreign, ours, base))
    path = plan.save(ours, options.output)
    size = path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())
    classes = f" of {len(plan.classnames)} classes" if plan.classnames else ""
    print(f"{options.output}: {size:,} bytes{f', a {plan.task}{classes}' if plan.task else ''}")
    return plan.next(options.output)


def _compared(options: argparse.Namespace, name: str, foreign: "ExternalAdapter", ours: "Module", base: "Base") -> str:
    """Return the outcome of the comparison with PEFT."""
    from randlora_pl.interop.peft.verify import LogitsOnly, difference, installed

    if options.source == "official":
        return f"Not compared: the official code is not available. Scaled by {foreign.adapter.alpha:g} / r."  # type: ignore[attr-defined]
    if not installed():
        return "Not compared: peft is not installed (pip install peft)."
    weights = [tensor for tensor in foreign.extra.values() if tensor.dim() == 2]
    biases = [tensor for tensor in foreign.extra.values() if tensor.dim() == 1]
    classifier = LogitsOnly(weights[0], biases[0] if biases else None) if weights else None
    try:
        found = difference(ours, base, options.path, classifier)
        return f"Largest difference to PEFT's outputs: {found.summary()}"
    except UserError as error:
        raise UserError(f"{name} cannot be imported: {error}.") from None


def _lines(file: Path) -> list[str]:
    """Return the lines of a file of class names."""
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classnames {file} cannot be read ({error}).") from None
    if len(names) < 2:
        raise UserError(f"--classnames {file} names {len(names)} classes; expected two or more, one per line.")
    return names
