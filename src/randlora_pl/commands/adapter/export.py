"""``adapter export``, ``merge`` and ``add``: adapters in other formats, in the weights of their models, and in sums."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from randlora_pl import adapters, models
from randlora_pl.commands.common import check_output, layer_table
from randlora_pl.language.catalog import given_to
from randlora_pl.language.offline import source_of
from randlora_pl.run.options.saved_config import check_adapter
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import disk_size, parse_json, refuse_inputs
from randlora_pl.utils.machine import check_onnx_packages
from randlora_pl.utils.options import Adapter, File, Finite, Overwrite, Weights, check_rank_or_error
from randlora_pl.utils.own_classes import import_words
from randlora_pl.utils.weights_files import local_name, register_weights

if TYPE_CHECKING:
    from randlora_pl.interop.low_rank import Converted
    from randlora_pl.interop.merge import Written

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


def export(
    adapter: Adapter,
    *,
    to: Literal["peft", "lora", "onnx", "torch", "adapter"],
    output: Path,
    overwrite: Overwrite = False,
    rank: int | None = None,
    error: float | None = None,
    part: Literal["classifier", "image", "text"] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    pretrained: Weights = (),
) -> int:
    """Convert an adapter to another format.

    The output is read again and compared before it gets its final name.

    Examples:
        randlora-pl adapter export ADAPTER --to peft --output DIR
        randlora-pl adapter export ADAPTER --to lora --error 0.05 --output DIR
        randlora-pl adapter export ADAPTER --to onnx --output model.onnx

    Args:
        to: Format, as explained below
        output: File or folder to write
        rank: lora: rank of every layer (or set --error)
        error: lora: largest relative error per layer (Frobenius), which selects the rank
        part: onnx, torch: classifier (default), image features, or text features of token ids
        dtype: adapter: data type of the tensors

    Note:
        The formats:
          peft      A folder for PeftModel.from_pretrained: RandLoRA, LoRA, AdaLoRA, VeRA, DoRA, PiSSA, LoRA-XS, HiRA,
                    SHiRA, OFT on linear layers
          lora      A plain LoRA adapter, by truncated singular value decomposition of each update
          onnx      The merged model as an ONNX file with class names (extra `onnx`)
          torch     The merged model as a torch.export program (.pt2)
          adapter   Our own format in another dtype, as a folder or one .safetensors file

        For weights of open_clip, timm or transformers, see: randlora-pl adapter merge --help
    """
    register_weights(pretrained)
    for name, value, forms in (
        ("--rank", rank, ("lora",)),
        ("--error", error, ("lora",)),
        ("--part", part, ("onnx", "torch")),
        ("--dtype", dtype, ("adapter",)),
    ):
        if value is not None and to not in forms:
            raise UserError(f"adapter export: {name} belongs to --to {' or '.join(forms)}, not to --to {to}.")
    check_output(output, overwrite)
    check_adapter(adapter)
    refuse_inputs([output], [adapter])
    if to == "peft":
        _export_peft(adapter, output)
    elif to == "lora":
        # truncates the singular value decomposition of each update
        check_rank_or_error(rank, error)
        from randlora_pl.interop import base_model, low_rank

        file = adapters.read_adapter(adapter)
        file.adapter.require_matrix("the export to LoRA", file.path)
        base_model.refuse_texts(file, "are written as a plain LoRA", decoders=True)
        base = base_model.load_base(file)
        origin = {"adapters": [low_rank.label(file)], "methods": [file.adapter.method()]}
        total = base_model.updates(base, file)
        made = low_rank.write_lora(output, base, total, [file], file, rank=rank, error=error, origin=origin)
        _print_converted(output, made, file)
    elif to == "adapter":
        from randlora_pl.adapters import save_load

        size = save_load.copy_adapter(adapter, output, save_load.DTYPES[dtype] if dtype else None)
        print(f"{output}: {size:,} bytes")
    else:
        _export_program(adapter, output, to == "onnx", part or "classifier")
    return 0


def _export_peft(adapter: Path, output: Path) -> None:
    """Write the folder, compare PEFT's outputs with ours, and print how to load it."""
    from randlora_pl.interop import external, peft_export, peft_import

    task = output / external.TASK
    done = peft_export.export_peft(adapter, output)
    shared = "randlora" in (output / peft_import.CONFIG).read_text()  # PEFT up to 0.21 expects a copy in every layer
    size = disk_size(output)
    if done.difference is None:
        print(f"{output}: {size:,} bytes, not compared with PEFT ({done.why})")
    else:
        print(f"{output}: {size:,} bytes; largest difference to PEFT's outputs {done.difference.summary()}")
    if shared:
        print("PEFT warns of missing keys per layer when it loads this, because the file has the bases once.")
    if done.classifier:
        print(f"The head is the model's own classifier ({done.classifier}), its classes are in {task.name}.")
    elif done.head:
        print(f"The head is in {output / peft_import.HEAD}, which PEFT does not read, its classes in {task.name}.")
    identity = done.identity
    if identity is not None and identity.pretrained == "random":
        print(f"Its base model has random weights (seed {identity.seed}), which no other program builds.")
    elif identity is not None:
        encoder = done.head and identity.library == "transformers"
        print("Load it with:")
        print(f"  base = {_code(identity, task if done.classifier or encoder else None)}")
        if encoder:
            print(f'  base.load_state_dict(load_file("{output / peft_import.HEAD}"), strict=False)')
        print(f'  model = PeftModel.from_pretrained(base{".base_model" * encoder}, "{output}")')


def _code(identity: "models.ModelIdentity", task: Path | None) -> str:
    """Return the code that builds the base model without this program, with a layer for the classes in ``task``."""
    classes = 0 if task is None else len(parse_json(task.read_text())["classnames"])
    if identity.library == "transformers":
        kind, more = "ForCausalLM", ""
        if task is not None:
            kind, more = "ForSequenceClassification", f", num_labels={max(1, classes)}"
        return f'AutoModel{kind}.from_pretrained("{source_of(identity.pretrained)}"{more})'
    if identity.config_sha256 and identity.library == "open_clip":
        return f'open_clip.create_model("{identity.name}")'
    if identity.library == "timm":
        from timm.models import get_pretrained_cfg

        own = identity.config_sha256 is not None
        config = None if own else get_pretrained_cfg(identity.name)
        usual = None if config is None else config.input_size[-1]
        if own:
            usual = models.vit_image_spec(local_name(identity.as_dict(), "the adapter")).size
        given = f"num_classes={classes}"
        given += f", img_size={identity.image_size}" if identity.image_size != usual else ""
        given += f', pretrained_cfg_overlay={{"file": "{identity.pretrained}"}}' if identity.sha256 and not own else ""
        return f'timm.create_model("{identity.name}", pretrained=True, {given})'
    if identity.name == "tiny":
        return 'randlora_pl.models.load_clip("tiny").model'
    return f'open_clip.create_model("{identity.name}", pretrained="{identity.pretrained}")'


def _print_converted(path: Path, made: "Converted", file: "adapters.AdapterFile") -> None:
    """Print rank and error of the layers, size, difference from the outputs of ``file``, and the next command."""
    rows = [vars(layer) for layer in made.layers]
    print(layer_table(rows, {"rank": "rank", "error": "error (mean)", "norm": "norm of the update"}, every=False))
    worst = max(made.layers, key=lambda layer: layer.error)
    print(f"error: {made.error:.2e} of all updates together (Frobenius), at most {worst.error:.2e} ({worst.layer})")
    inputs = f"largest difference of outputs on random {made.inputs}"
    print(f"{inputs}: {made.difference:.1e}, {made.relative:.1e} of the largest")
    print(f"{path}: LoRA, {made.parameters:,} parameters, {made.size:,} bytes")
    print(f"  randlora-pl predict --adapter {path} {given_to(file.metadata.get('task'))}{import_words()}")


def _export_program(adapter: Path, output: Path, to_onnx: bool, part: str) -> None:
    """Write the ONNX file or program of PyTorch, and print how to run it."""
    suffix = ".onnx" if to_onnx else ".pt2"
    if output.suffix != suffix:
        raise UserError(f"--output is {output}: give a file that ends in {suffix}.")
    if output.is_dir():
        raise UserError(f"{output} is a folder; give a file.")
    if to_onnx:
        check_onnx_packages()  # before PyTorch is imported
    from randlora_pl.interop.onnx import FACTS, export_onnx, export_torch, load_program

    program = load_program(adapter, part)
    written = (export_onnx if to_onnx else export_torch)(program, output)
    facts = program.facts
    classes = f" of {len(facts['classnames']):,} classes" if facts["part"] == "classifier" else " features"
    print(f"{' and '.join(map(str, written.files))}: {written.size:,} bytes, {facts['part']}{classes}")
    print(f"largest difference from PyTorch {written.difference:.1e} (random inputs, 1 and 3 at a time)")
    print(f"input   {facts['input']};\n        {facts['preprocessing']}\noutput  {facts['output']}\n")
    print(f"To run it with {'onnxruntime' if to_onnx else 'PyTorch'} alone:")
    template = _ONNX if to_onnx else _TORCH
    names = ", ".join(program.outputs)
    print(template.format(file=str(output), input=program.input, output=program.outputs[-1], outputs=names))
    where = "session.get_modelmeta().custom_metadata_map" if to_onnx else f"the extra file {FACTS}"
    print(f"Class names, prompts, base model and more: {where}")


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
        written with its linear head as classifier. The model tiny, which open_clip does not have, is described in
        FILE.json.
    """
    register_weights(pretrained)
    check_adapter(adapter)
    from randlora_pl.interop import base_model, merge, summary

    file = adapters.read_adapter(adapter)
    file.adapter.require_matrix("the merge", file.path)  # before a large model is built
    summary.check_merge(file, scale)
    if file.config.get("base_model", {}).get("library") == "transformers":
        kind, size, gap = merge.write_merged(file, output, scale, overwrite)
        print(f"{output}: {size:,} bytes, a folder for transformers")
        print(f"largest difference of logits, loaded by transformers alone, on random tokens: {gap:.1e}")
        print(f"  {kind}.from_pretrained({str(output)!r})")
        return 0
    merge.check_output(output, [adapter], overwrite)
    written = merge.write(output, merge.merged(base_model.load_base(file), file, scale, head), overwrite)
    which = {0.0: "the base model's weights, unchanged", 1.0: "the tuned weights"}
    print(f"scale {scale:g}: {which.get(scale, f'W0 + {scale:g} (W - W0) in every tuned tensor')}")
    _print_written(written)
    return 0


def _print_written(written: "Written") -> None:
    """Print files, sizes, the largest difference, and how to load the files."""
    for file, size in written.sizes.items():
        print(f"{file}: {size:,} bytes")
    print(f"largest difference of outputs, loaded by the bare library, on random images: {written.difference:.1e}")
    for note in written.notes:
        print(note)
    for line in written.load:
        print(f"  {line}")


def add(
    paths: Sequence[Adapter],
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
        rank: lora: rank of every layer (or set --error)
        error: lora: largest relative error per layer (Frobenius), which selects the rank
        head: Number of the adapter whose head and class names are used
    """
    register_weights(pretrained)
    count = len(paths)
    weights = weights or [1.0] * count
    if len(weights) != count:
        raise UserError(f"adapter add: {len(weights)} --weights for {count} adapters; give one per adapter.")
    if not 1 <= head <= count:
        raise UserError(f"adapter add: --head is {head}; give a number from 1 to {count}, the adapter's place.")
    if as_ == "merged" and (rank is not None or error is not None):
        raise UserError("adapter add: --rank and --error need --as lora.")
    if as_ != "merged":
        check_rank_or_error(rank, error)
    for path in paths:
        check_adapter(path)
    from randlora_pl.interop import base_model, low_rank, merge, summary

    if as_ == "merged":
        merge.check_output(output, paths, overwrite)
    else:
        refuse_inputs([output], paths)
        check_output(output, overwrite)
    files = [adapters.read_adapter(path) for path in paths]
    for file in files:
        file.adapter.require_matrix("the sum", file.path)
        if as_ == "merged":
            base_model.refuse_texts(file, "have their sum merged (--as lora --rank K takes decoders, too)")
        base_model.refuse_texts(file, "have their updates added up", decoders=True)
        summary.check_no_prompts(file, "they belong to one update, so sums have none. Predict with each of them")
    base_model.same_base(files)
    first = files[head - 1]
    base = base_model.load_base(first)
    total = base_model.weighted_sum([base_model.updates(base, file) for file in files], weights)
    for file, weight in zip(files, weights, strict=True):
        print(f"{weight:g} x {file.path} ({file.adapter.method()})")
    if as_ == "merged":
        _print_written(merge.write(output, merge.added(base, first, total), overwrite))
        return 0
    origin = {
        "adapters": [low_rank.label(file) for file in files],
        "methods": [file.adapter.method() for file in files],
        "weights": list(weights),
    }
    made = low_rank.write_lora(output, base, total, files, first, rank=rank, error=error, origin=origin)
    _print_converted(output, made, first)
    return 0
