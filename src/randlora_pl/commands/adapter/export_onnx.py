"""``adapter export --to onnx`` and ``--to torch``: the merged model as a file that runs without this program."""

import argparse

from randlora_pl.interop.onnx.packages import check_packages
from randlora_pl.utils.errors import UserError

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}

_ONNX = """\
  import onnxruntime
  session = onnxruntime.InferenceSession({file!r})
  {output} = session.run([{output!r}], {{{input!r}: {input}}})[0]
"""
_TORCH = """\
  import torch
  program = torch.export.load({file!r}).module()
  {outputs} = program({input})
"""


def export(options: argparse.Namespace) -> int:
    """Write the file, and print how to run it."""
    suffix = SUFFIXES[options.to]
    if options.output.suffix != suffix:
        raise UserError(f"--output is {options.output}: name a file that ends in {suffix}.")
    if options.output.is_dir():
        raise UserError(f"{options.output} is a folder; name a file.")
    if options.to == "onnx":
        check_packages()  # before PyTorch is imported
    from randlora_pl.interop.onnx.export import FACTS, export_onnx, export_torch
    from randlora_pl.interop.onnx.program import load_program

    program = load_program(options.adapter, options.part or "classifier")
    written = (export_onnx if options.to == "onnx" else export_torch)(program, options.output)
    facts = program.facts
    classes = f" of {len(facts['classnames']):,} classes" if facts["part"] == "classifier" else " features"
    print(f"{' and '.join(map(str, written.files))}: {written.size:,} bytes, {facts['part']}{classes}")
    print(f"largest difference from PyTorch {written.difference:.1e} (random inputs, 1 and 3 at a time)")
    print(f"input   {facts['input']};\n        {facts['preprocessing']}\noutput  {facts['output']}\n")
    print(f"To run it with {'onnxruntime' if options.to == 'onnx' else 'PyTorch'} alone:")
    template = _ONNX if options.to == "onnx" else _TORCH
    names = ", ".join(program.outputs)
    print(template.format(file=str(options.output), input=program.input, output=program.outputs[-1], outputs=names))
    where = "session.get_modelmeta().custom_metadata_map" if options.to == "onnx" else f"the extra file {FACTS}"
    print(f"Class names, prompts, base model and more: {where}")
    return 0
