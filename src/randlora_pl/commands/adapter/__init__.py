"""Inspect, convert and share adapters.

ADAPTER is a folder, one .safetensors file, or a run (RUN, or runs/NAME for its newest run), whose tested adapter is
used.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

from randlora_pl import adapters, models
from randlora_pl.commands.common import check_output, check_parent, entry, layer_table, print_json
from randlora_pl.commands.predict import names_in
from randlora_pl.language.catalog import TASKS, given_to
from randlora_pl.language.tasks import ImportedTask
from randlora_pl.run.options.saved_config import check_adapter
from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.files import disk_size, write_text
from randlora_pl.utils.options import Adapter, File, Folder, Json, Option, Overwrite, Weights
from randlora_pl.utils.text import printable
from randlora_pl.utils.weights_files import base_words, register_weights


def info(adapter: Adapter, *, layers: bool = False, json: Json = False, pretrained: Weights = ()) -> int:
    """Describe an adapter: method, base model, classes and training.

    Per layer, print rank, stable rank, effective rank and norm of its update, and the norm of the base model's weight.
    Nothing is downloaded. If the base model is not on this machine, only the facts in the file are printed.

    Examples:
        randlora-pl adapter info ADAPTER
        randlora-pl adapter info ADAPTER --json

    Args:
        layers: Print a row per layer instead of the mean per kind of layer

    Note:
        The columns of the table:
          rank            singular values above float32's rounding (max(out, in) * 1.2e-7 of the largest)
          stable rank     ||D||_F^2 / ||D||_2^2
          effective rank  exp of the entropy of the normalized singular values (Roy and Vetterli, 2007)
          norm            Frobenius norm; ratio: to the norm of the base model's weight
    """
    (file,) = _read_offline([adapter], pretrained)
    from randlora_pl.interop import summary

    known = summary.facts(file)
    if not json:
        for name, text in _described(known).items():
            print(entry(name, text, 0, 16))
    rows, missing = summary.layers(file)
    if json:
        return print_json(known | {"layers": rows, "missing": missing})
    if known["fingerprint"] and not any(reason.startswith("updates:") for reason in missing):
        print(entry("checked", "the random bases match that fingerprint", 0, 16))
    if rows:
        columns = {
            "rank": "rank",
            "stable_rank": "stable rank",
            "base_stable_rank": "base's",
            "effective_rank": "effective rank",
            "base_effective_rank": "base's",
            "norm": "norm",
            "base_norm": "base's",
            "ratio": "ratio",
        }
        print(f"\n{layer_table(rows, columns, layers)}")
    for reason in missing:
        print(f"not shown, {printable(reason)}")
    return 0


def _read_offline(paths: Sequence[Path], pretrained: Sequence[Path]) -> "list[adapters.AdapterFile]":
    """Read adapters; a look at them must not fetch their models, of which cached files are found."""
    register_weights(pretrained)
    for path in paths:
        check_adapter(path)
    os.environ["HF_HUB_OFFLINE"] = "1"
    return [adapters.read_adapter(path) for path in paths]


def _described(known: Mapping[str, Any]) -> dict[str, str]:
    """Return the facts of an adapter as text."""
    base = known["base_model"]
    extra = [f"{key} {base[key]}" for key in ("image_size", "seed") if base.get(key) is not None]
    digest = str(base.get("weights_sha256_sampled") or "unknown")[:12]
    head = f" and {known['head_parameters']:,} of a head" if known["head_parameters"] else ""
    head = f" and {known['prompt_parameters']:,} of prompts{head}" if known["prompt_parameters"] else head
    head += f", {known['kept_numbers']:,} numbers kept without a gradient" if known["kept_numbers"] else ""
    size = f"{known['tensor_bytes']:,} bytes of {', '.join(known['dtypes'])}, {known['file_bytes']:,} on the disk"
    options = ", ".join(f"{key} {_short(value)}" for key, value in known["options"].items() if value is not None)
    texts = {
        "adapter": f"{known['path']} (format {known['format_version']})",
        "method": f"{known['method']}{': ' if options else ''}{options}",
        "trained": f"{known['parameters']:,} parameters{head}, {size}",
        "base model": ", ".join([base_words(base) or "not named", *extra, f"weights {digest}"]),
        "targets": f"{'default' if known['targets'] is None else _short(known['targets'])}: {known['adapted']} tensors",
    }
    frame, names = known["training"].get("frame"), known["classnames"]
    first = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
    first += "; an image may have several, each with a sigmoid" if known["several_labels"] else ""
    bases = f"seed {known['seed']}, {known['generator']}, fingerprint {str(known['fingerprint'])[:12]}"
    texts |= {
        "trained whole": _short(known["trained"]) if known["trained"] else "",
        "random bases": bases if known["fingerprint"] else "",
        "task": known["task"],
        "captions" if known["captions"] else "classes": f"{len(names):,}: {first}" if names else "",
        "prompts": known["prompts"],
        **{name: _short(part) for name, part in known["learned"].items()},
        "training": _pairs({key: value for key, value in known["training"].items() if key != "frame"}),
        "images": models.ImageSpec.of_values(frame).summary() if frame else "",
        "made from": _pairs(known["made_from"]),
    }
    return {name: text for name, text in texts.items() if text}


def _pairs(known: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in known.items())


def _short(value: Any) -> str:
    """Return a value as short text; a table of patterns as its size."""
    if isinstance(value, dict) and value.keys() == {"method", "options"}:
        inner = ", ".join(f"{key} {_short(each)}" for key, each in value["options"].items() if each is not None)
        return f"{value['method']} ({inner})"
    if isinstance(value, dict) and len(value) > 4:
        return f"by {len(value)} patterns"
    if isinstance(value, list) and len(value) > 4:
        return f"{', '.join(map(str, value[:4]))}, ... ({len(value)})"
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def diff(first: Adapter, second: Adapter, *, layers: bool = False, json: Json = False, pretrained: Weights = ()) -> int:
    """Compare two adapters: method, options, base model, targets, classes and training.

    If base model and shapes are the same, print the norm of the difference of their updates and their cosine per layer.
    Nothing is downloaded.

    Examples:
        randlora-pl adapter diff A B

    Args:
        layers: Print a row per layer instead of the mean per kind of layer
    """
    files = _read_offline([first, second], pretrained)
    from randlora_pl.interop import base_model, summary

    one, two = (summary.facts(file) for file in files)
    why, rows = "", []
    try:
        base_model.same_base(files)
        rows = summary.compared(*map(base_model.layer_updates, files))
        if not rows:
            why = "no layer of one has the name and shape of a layer of the other"
    except UserError as error:
        why = str(error)
    changed = {key: [one[key], two[key]] for key in one if one[key] != two[key] and key not in ("path", "file_bytes")}
    if json:
        return print_json({"differences": changed, "layers": rows, "missing": [why] if why else []})
    print(entry("A", str(files[0].path), 0, 16))
    print(entry("B", str(files[1].path), 0, 16))
    texts = []  # one entry per option of the method and per metric of the training
    for known in (one, two):
        words = _described({**known, "options": {}, "training": {}})
        del words["adapter"]
        words |= {f"option {key}": str(value) for key, value in known["options"].items()}
        texts.append(words | {f"training {key}": str(value) for key, value in known["training"].items()})
    keys = [key for key in dict.fromkeys(chain(*texts)) if texts[0].get(key) != texts[1].get(key)]
    if not keys:
        print("method, options, base model, seed, targets, classes and training are the same")
    for key in keys:
        print(entry(key, f"A: {texts[0].get(key, '-')}", 0, 16))
        print(entry("", f"B: {texts[1].get(key, '-')}", 0, 16))
    if rows:
        left_out = len(files[0].layers.keys() | files[1].layers.keys()) - len(rows)
        print()
        columns = {"norm_1": "norm of A", "norm_2": "norm of B", "difference": "norm of A - B", "cosine": "cosine"}
        print(layer_table(rows, columns, layers))
        if left_out:
            print(f"{left_out} layers of only one of them, or of other shapes, are left out")
        if all(row["difference"] == 0 for row in rows) and not left_out:
            print("the updates are the same, bit for bit")
    if why:
        print(f"updates not compared: {why}")
    return 0


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
        model: Base model: a name of timm or open_clip, or of a language model (see --task). Default for PEFT: the one
            in its config
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
    print(_convert(path, from_, output, str(path), model, pretrained, names, task, bases_dtype, alpha))
    return 0


def _convert(
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

    ``source`` is `from_` of `import_`, the other options are the same, and ``name`` is the adapter in messages.
    """
    import torch

    from randlora_pl.interop import base_model, external, peft_export, peft_import
    from randlora_pl.tasks.restore import adopting

    adapter = peft_import.read_peft(path, name) if source == "peft" else None
    if model is None:
        named = None if adapter is None else peft_import.named_base(adapter)
        if named is None:
            given = None if adapter is None else adapter.config.get("base_model_name_or_path")
            hint = f" Its config has {brief(given)}." if given else ""
            folder = name if name == str(path) else "DIR"
            download = "" if folder == name else f"hf download {name} --local-dir DIR, then "
            raise UserError(
                f"The base model of {name} is unknown.{hint} Give it with --model: {download}randlora-pl adapter "
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
    classes = f" of {len(plan.classnames)} classes" if plan.classnames else ""
    print(f"{output}: {disk_size(written):,} bytes{f', a {plan.task.__name__}{classes}' if plan.task else ''}")
    return plan.next(output)


Repo = Annotated[str, Option("USER/NAME", "The repository")]


def push(
    adapter: Adapter,
    *,
    repo: Repo,
    private: bool = False,
    revision: Annotated[str | None, Option("BRANCH")] = None,
    license: Annotated[str | None, Option("SPDX")] = None,
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
        license: License of the adapter in the card, for example apache-2.0
        message: Commit message
        card: Upload this card. If the file does not exist yet, write the card to it and upload nothing
        dry_run: Print the files and the card, without uploading or writing

    Note:
        Log in first: run hf auth login, or set HF_TOKEN. HF_ENDPOINT names another server.
    """
    if not message.strip():
        raise UserError("--message is empty: describe in a few words what changed.")
    check_adapter(adapter)
    from randlora_pl.interop import hub
    from randlora_pl.utils.hub import check_repo

    check_repo(repo)
    file = adapters.read_adapter(adapter)
    if card is not None and card.exists():
        try:
            text = card.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{card} cannot be read as text ({type(error).__name__}); set another --card.") from error
    else:
        text = hub.make_card(file, repo, license)
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
    which also needs the weights of its base model.

    Args:
        output: Folder to write
        revision: Branch, tag or commit (default: main)

    Note:
        Private repositories need hf auth login, or HF_TOKEN. HF_ENDPOINT names another server.
    """
    check_output(output, overwrite)
    if output.suffix == ".safetensors" or output.is_file():
        raise UserError(f"--output is {output}: give a folder. For a single file: adapter export DIR --to adapter.")
    from randlora_pl.interop import hub
    from randlora_pl.utils.hub import PeftRepositoryError, check_repo

    check_repo(repo)
    try:
        file, commit, size = hub.pull_adapter(repo, output, revision)
    except PeftRepositoryError:
        with TemporaryDirectory() as folder:
            commit = hub.download_peft(repo, Path(folder), revision)
            following = _convert(Path(folder), "peft", output, name=repo)
        print(f"converted from PEFT, commit {commit[:12]} of {repo}\n\n{following}")
        return 0
    base = file.config.get("base_model", {})
    classes = file.metadata.get("classnames") or []
    what = f" for {len(classes):,} classes" if classes else ""
    print(f"{output}: {file.adapter.method()} adapter of {base_words(base) or 'a base model'}{what}")
    print(f"{size:,} bytes, commit {commit[:12]} of {repo}")
    if sha := base.get("sha256"):
        print(f"its base model needs the weights file {base.get('pretrained')} (SHA-256 {sha})")
    task = file.metadata.get("task")
    predicts = f"predict --adapter {output} {given_to(task)} --output predictions.csv"
    print(f"\nNext: randlora-pl {predicts if classes or task in TASKS else f'adapter info {output}'}")
    return 0
