"""``adapter import``: an adapter of PEFT or of the official code as one of ours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from randlora_pl.commands.common.terminal import check_output
from randlora_pl.commands.predict import names_in
from randlora_pl.language.catalog import TASKS
from randlora_pl.language.tasks import ImportedTask
from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.options import File, Option, Overwrite


def import_(
    path: Path,
    *,
    from_: Literal["peft", "official"],
    model: str | None = None,
    pretrained: Annotated[str | None, Option("TAG")] = None,
    output: Path,
    overwrite: Overwrite = False,
    classnames: File | None = None,
    task: ImportedTask | None = None,
    bases_dtype: Literal["bfloat16", "float16"] | None = None,
    alpha: float | None = None,
) -> int:
    """Convert an adapter of another program to ours.

    If peft is installed, the outputs are compared with PEFT's.

    Examples:
        randlora-pl adapter import DIR --from peft --model vit_base_patch16_224 --pretrained timm --output adapter
        randlora-pl adapter import FILE --from official --model ViT-B-32 --pretrained openai --output adapter

    Args:
        path: Folder or file of the other program
        from_: peft: a folder of save_pretrained: RandLoRA (also without its bases), LoRA, DoRA, PiSSA, VeRA, HiRA,
            SHiRA, OFT. official: a checkpoint of the vision code of RandLoRA's authors
        model: Base model: a name of timm or open_clip, or of a language model (see --task). Default for PEFT: the model
            that the adapter names
        pretrained: Its weights: timm, a tag, a file, or random. For a language model a folder, or nothing
        output: Folder or .safetensors file to write
        classnames: One class per line, so that the adapter can predict. Prompts of a text head: "a photo of a {}."
        task: CausalLMTask is for a decoder of transformers. By default it is used for task_type CAUSAL_LM, and
            LinearHeadTask for an adapter with a head
        bases_dtype: peft without bases: bfloat16 (default), or float16 if PEFT trained without bfloat16
        alpha: official: the updates are scaled by A / r, which the file does not store (default: 1)
    """
    for name, value, source in (("--bases-dtype", bases_dtype, "peft"), ("--alpha", alpha, "official")):
        if value is not None and from_ != source:
            raise UserError(f"adapter import: {name} belongs to --from {source}.")
    if not path.exists():
        raise UserError(f"{path} does not exist; give a folder of PEFT's, or a checkpoint file.")
    check_output(output, overwrite)
    names = names_in(classnames) if classnames else []
    print(convert(path, from_, output, str(path), model, pretrained, names, task, bases_dtype, alpha))
    return 0


def convert(
    path: Path,
    source: str,
    output: Path,
    name: str,
    model: str | None = None,
    pretrained: str | None = None,
    classnames: Sequence[str] = (),
    task: str | None = None,
    bases_dtype: str | None = None,
    alpha: float | None = None,
) -> str:
    """Convert an adapter, print the comparison, and write it; return the next command.

    Args:
        path: Folder or file of the adapter.
        source: Program that wrote it: ``peft`` or ``official``.
        output: Folder or file to write.
        name: The adapter in messages.
        model: Name of the base model; None for the one that an adapter of PEFT names.
        pretrained: Weights of the base model.
        classnames: Names of the classes.
        task: Task that predicts with it.
        bases_dtype: Type of PEFT's random bases.
        alpha: Scale of an official checkpoint.
    """
    import torch

    from randlora_pl.interop import base_model, external, imported
    from randlora_pl.interop.peft import export as peft
    from randlora_pl.interop.peft import files as peft_files
    from randlora_pl.interop.peft import import_ as peft_import
    from randlora_pl.tasks.restore import adopting

    adapter = peft_files.read(path, name) if source == "peft" else None
    if model is None:
        found = None if adapter is None else peft_files.named_base(adapter)
        if found is None:
            given = None if adapter is None else adapter.config.get("base_model_name_or_path")
            hint = f" Its config names {brief(given)}." if given else ""
            folder = name if name == str(path) else "DIR"
            download = "" if folder == name else f"hf download {name} --local-dir DIR, then "
            raise UserError(
                f"The base model of {name} is not known.{hint} Name it by --model: {download}randlora-pl adapter "
                f"import {folder} --from {source} --model NAME --pretrained TAG --output ADAPTER"
            )
        model, pretrained = found[0], pretrained or found[1]
    trained = {} if adapter is None else adapter.task.get("arguments", {})  # of an adapter exported here
    written = adapter is not None and adapter.config.get("task_type") == "CAUSAL_LM" and task is None
    arguments: dict[str, Any] = {}  # of a decoder's task
    if task in TASKS or written:
        base, arguments = imported.load_decoder(model, pretrained, trained)
    else:
        base = base_model.named(model, pretrained, trained.get("seed", 0), trained.get("img_size"))
    if adapter is not None:
        imported.check_base(adapter, base)
        foreign = peft_import.translate(adapter, base.model, getattr(torch, bases_dtype or "bfloat16"))
    else:
        foreign = external.translate_official(path, base.model, 1.0 if alpha is None else alpha)
    if owned := foreign.owned(base.model):
        raise UserError(
            f"{name}: {next(iter(owned))} was trained as a whole, which no task supports. Import it in Python: "
            "save_adapter(import_peft(PATH, model), OUTPUT)"
        )
    if arguments:
        plan = imported.ImportPlan(foreign, base, adopting("decoder"), arguments=arguments)
    else:
        plan = imported.ImportPlan.make(foreign, base, adapter, task, list(classnames))
    ours = base.copy().model
    print(foreign.inject(ours))
    if source == "official":
        alpha = foreign.adapter.alpha  # type: ignore[attr-defined]
        print(f"Not compared: the official code is not available. Scaled by {alpha:g} / r.")
    elif not peft.installed():
        print("Not compared: peft is not installed (pip install peft).")
    else:
        weights = [tensor for tensor in foreign.extra.values() if tensor.dim() == 2]
        biases = [tensor for tensor in foreign.extra.values() if tensor.dim() == 1]
        classifier = (weights[0], biases[0] if biases else None) if weights else None
        try:
            print(f"Largest difference to PEFT's outputs: {peft.difference(ours, base, path, classifier).summary()}")
        except UserError as error:
            raise UserError(f"{name} cannot be imported: {error}.") from None
    saved = plan.save(ours, output)
    size = saved.stat().st_size if saved.is_file() else sum(file.stat().st_size for file in saved.iterdir())
    classes = f" of {len(plan.classnames)} classes" if plan.classnames else ""
    print(f"{output}: {size:,} bytes{f', a {plan.task.__name__}{classes}' if plan.task else ''}")
    return plan.next(output)
