"""``adapter push``, ``pull`` and ``import``: adapters to the Hugging Face Hub, from it, and from other programs."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

from randlora_pl.commands.common import check_output, check_parent
from randlora_pl.commands.predict import names_in
from randlora_pl.language.catalog import TASKS, given_to
from randlora_pl.language.tasks import ImportedTask
from randlora_pl.run.options.adapter_config import check_adapter
from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.files import write_text
from randlora_pl.utils.options import Adapter, File, Folder, Option, Overwrite
from randlora_pl.utils.text import printable


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

    from randlora_pl.interop import base_model, external, peft_export, peft_import
    from randlora_pl.tasks.restore import adopting

    adapter = peft_import.read_peft(path, name) if source == "peft" else None
    if model is None:
        named = None if adapter is None else peft_import.named_base(adapter)
        if named is None:
            given = None if adapter is None else adapter.config.get("base_model_name_or_path")
            hint = f" Its config names {brief(given)}." if given else ""
            folder = name if name == str(path) else "DIR"
            download = "" if folder == name else f"hf download {name} --local-dir DIR, then "
            raise UserError(
                f"The base model of {name} is not known.{hint} Name it by --model: {download}randlora-pl adapter "
                f"import {folder} --from {source} --model NAME --pretrained TAG --output ADAPTER"
            )
        model, pretrained = named[0], pretrained or named[1]
    trained = {} if adapter is None else adapter.task.get("arguments", {})  # of an adapter exported here
    written = adapter is not None and adapter.config.get("task_type") == "CAUSAL_LM" and task is None
    arguments: dict[str, Any] = {}  # of a decoder's task
    if task in TASKS or written:
        base, arguments = external.load_decoder(model, pretrained, trained)
    else:
        base = base_model.named(model, pretrained, trained.get("seed", 0), trained.get("img_size"))
    if adapter is not None:
        external.check_base(adapter.path, adapter.task, base)
        foreign = peft_import.translate(adapter, base.model, getattr(torch, bases_dtype or "bfloat16"))
    else:
        foreign = external.translate_official(path, base.model, 1.0 if alpha is None else alpha)
    if owned := foreign.owned(base.model):
        raise UserError(
            f"{name}: {next(iter(owned))} was trained as a whole, which no task supports. Import it in Python: "
            "save_adapter(import_peft(PATH, model), OUTPUT)"
        )
    if arguments:
        plan = external.ImportPlan(foreign, base, adopting("decoder"), arguments=arguments)
    else:
        head, saved = ({}, {}) if adapter is None else (adapter.head, adapter.task)
        plan = external.ImportPlan.make(foreign, base, head, saved, task, list(classnames))
    ours = base.copy().model
    print(foreign.inject(ours))
    if source == "official":
        alpha = foreign.adapter.alpha  # type: ignore[attr-defined]
        print(f"Not compared: the official code is not available. Scaled by {alpha:g} / r.")
    elif not peft_export.installed():
        print("Not compared: peft is not installed (pip install peft).")
    else:
        weights = [tensor for tensor in foreign.extra.values() if tensor.dim() == 2]
        biases = [tensor for tensor in foreign.extra.values() if tensor.dim() == 1]
        classifier = (weights[0], biases[0] if biases else None) if weights else None
        try:
            difference = peft_export.difference(ours, base, path, classifier)
            print(f"Largest difference to PEFT's outputs: {difference.summary()}")
        except UserError as error:
            raise UserError(f"{name} cannot be imported: {error}.") from None
    written = plan.save(ours, output)
    size = written.stat().st_size if written.is_file() else sum(file.stat().st_size for file in written.iterdir())
    classes = f" of {len(plan.classnames)} classes" if plan.classnames else ""
    print(f"{output}: {size:,} bytes{f', a {plan.task.__name__}{classes}' if plan.task else ''}")
    return plan.next(output)


Repo = Annotated[str, Option("USER/NAME", "The repository")]


def push(
    adapter: Adapter,
    *,
    repo: Repo,
    private: bool = False,
    revision: Annotated[str | None, Option("BRANCH")] = None,
    licence: Annotated[str | None, Option("SPDX", names=("--licence", "--license"))] = None,
    message: Annotated[str, Option("TEXT")] = "Add adapter",
    card: File | None = None,
    dry_run: bool = False,
) -> int:
    """Upload an adapter to the Hugging Face Hub with a model card.

    The card has base model, classes, metrics, and how to use and train the adapter. The metrics and the config
    come from the adapter's run folder. Local paths are not uploaded.

    Examples:
        randlora-pl adapter push RUN/adapter --repo USER/NAME --dry-run      print the upload, without a network
        randlora-pl adapter push RUN/adapter --repo USER/NAME --card card.md     write the card so that you can edit it
        randlora-pl adapter push RUN/adapter --repo USER/NAME --card card.md     the second time: upload

    Args:
        repo: The repository, which is created if it does not exist
        private: Make it private. Fails if a public repository with that name exists
        revision: Branch, which is created if it does not exist (default: main)
        licence: Licence of the adapter in the card, for example apache-2.0
        message: Commit message
        card: Upload this card. If the file does not exist yet, write the card to it and upload nothing
        dry_run: Print the files and the card, without uploading or writing

    Note:
        Log in first: run hf auth login, or set HF_TOKEN. HF_ENDPOINT names another server.
    """
    if not message.strip():
        raise UserError("--message is empty: describe in a few words what changed.")
    check_adapter(adapter)
    from randlora_pl.adapters import read_adapter
    from randlora_pl.interop import hub

    hub.check_repo(repo)
    file = read_adapter(adapter)
    if card is not None and card.exists():
        try:
            text = card.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{card} cannot be read as text ({type(error).__name__}); name another --card.") from error
    else:
        text = hub.make_card(file, repo, licence)
        if card is not None and not dry_run:
            check_parent(card)
            write_text(card, text)
            print(f"{card}: the card, not uploaded yet. Edit it, then run the same command again to upload it.")
            return 0
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "files"
        hub.stage(adapter, folder, text)
        sizes = {entry.name: entry.stat().st_size for entry in sorted(folder.iterdir())}
        if dry_run:
            print(f"would be uploaded to {repo}{f', branch {revision}' if revision else ''}:")
            print("\n".join(f"  {name:22} {size:>13,} bytes" for name, size in sizes.items()))
            print(f"\nREADME.md:\n\n{printable(text)}", end="")
            return 0
        address = hub.push_folder(folder, repo, private=private, revision=revision, message=message)
    print(f"{address}: {len(sizes)} files, {sum(sizes.values()):,} bytes")
    if sha := file.config.get("base_model", {}).get("sha256"):
        print(f"the weights of its base model are your own file, which is not uploaded (SHA-256 {sha})")
    branch = f" --revision {revision}" if revision else ""
    print(f"\nNext: randlora-pl adapter pull {repo}{branch} --output {repo.rpartition('/')[2]}")
    return 0


def pull(
    repo: Repo, *, output: Folder, revision: Annotated[str | None, Option("NAME")] = None, overwrite: Overwrite = False
) -> int:
    """Download an adapter from the Hugging Face Hub.

    It is checked before it gets its final name. Code is never downloaded. An adapter of PEFT is converted to ours,
    which also needs the weights of the base model that it names.

    Args:
        output: Folder to write
        revision: Branch, tag or commit (default: main)

    Note:
        Private repositories need hf auth login, or HF_TOKEN. HF_ENDPOINT names another server.
    """
    check_output(output, overwrite)
    if output.suffix == ".safetensors" or output.is_file():
        raise UserError(f"--output is {output}: name a folder. One file: adapter export DIR --to adapter.")
    from randlora_pl.interop import hub

    hub.check_repo(repo)
    try:
        file, commit, size = hub.pull_adapter(repo, output, revision)
    except hub.PeftRepositoryError:
        with TemporaryDirectory() as folder:
            commit = hub.download_peft(repo, Path(folder), revision)
            following = convert(Path(folder), "peft", output, name=repo)
        print(f"converted from PEFT, commit {commit[:12]} of {repo}\n\n{following}")
        return 0
    base = file.config.get("base_model", {})
    model = " ".join(str(base[key]) for key in ("library", "name", "pretrained") if base.get(key))
    classes = file.metadata.get("classnames") or []
    what = f" for {len(classes):,} classes" if classes else ""
    print(f"{output}: {file.adapter.method()} adapter of {model or 'a base model'}{what}")
    print(f"{size:,} bytes, commit {commit[:12]} of {repo}")
    if sha := base.get("sha256"):
        print(f"its base model needs the weights file {base.get('pretrained')} (SHA-256 {sha})")
    task = file.metadata.get("task")
    predicts = f"predict --adapter {output} {given_to(task)} --output predictions.csv"
    print(f"\nNext: randlora-pl {predicts if classes or task in TASKS else f'adapter info {output}'}")
    return 0
