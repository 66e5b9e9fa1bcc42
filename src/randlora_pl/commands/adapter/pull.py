"""``adapter pull``: an adapter from the Hugging Face Hub."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from randlora_pl.commands.common.arguments import CommandParser, check_output
from randlora_pl.language.catalog import TASKS, given_to
from randlora_pl.utils.errors import UserError

PAGE = """\
Download an adapter from the Hugging Face Hub. It is checked before it gets its final name. Code is never downloaded.
An adapter of PEFT is converted to ours, which also needs the weights of the base model that it names.

  randlora-pl adapter pull USER/NAME --output DIR

  --output DIR         Folder to write
  --revision NAME      Branch, tag or commit (default: main)
  --overwrite          Replace the output if it exists

Private repositories need hf auth login, or HF_TOKEN. HF_ENDPOINT names another server.
"""


def _parse(args: list[str]) -> argparse.Namespace:
    parser = CommandParser("adapter pull")
    parser.add_argument("repo")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_options(revision=str, overwrite=False)
    options = parser.parse_args(args)
    check_output(options.output, options.overwrite)
    if options.output.suffix == ".safetensors" or options.output.is_file():
        raise UserError(f"--output is {options.output}: name a folder. One file: adapter export DIR --to adapter.")
    return options


def pull_verb(args: list[str]) -> int:
    """Fetch and check the adapter, and print its description."""
    options = _parse(args)
    from randlora_pl.interop.hub.transfer import PeftRepositoryError, check_repo, pull_adapter

    check_repo(options.repo)
    try:
        pulled = pull_adapter(options.repo, options.output, options.revision)
    except PeftRepositoryError:
        return _convert(options)
    file, base = pulled.file, pulled.file.config.get("base_model", {})
    model = " ".join(str(base[key]) for key in ("library", "name", "pretrained") if base.get(key))
    classes = file.metadata.get("classnames") or []
    what = f" for {len(classes):,} classes" if classes else ""
    print(f"{options.output}: {file.adapter.method()} adapter of {model or 'a base model'}{what}")
    print(f"{pulled.size:,} bytes, commit {pulled.commit[:12]} of {options.repo}")
    if sha := base.get("sha256"):
        print(f"its base model needs the weights file {base.get('pretrained')} (SHA-256 {sha})")
    task = file.metadata.get("task")
    predicts = f"predict --adapter {options.output} {given_to(task)} --output predictions.csv"
    print(f"\nNext: randlora-pl {predicts if classes or task in TASKS else f'adapter info {options.output}'}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    """Fetch an adapter of PEFT, convert it, and print the next command."""
    from randlora_pl.commands.adapter.import_ import convert
    from randlora_pl.interop.hub.transfer import download_peft

    chosen = dict.fromkeys(("model", "pretrained", "classnames", "task", "alpha", "bases_dtype"))
    with TemporaryDirectory() as folder:
        commit = download_peft(options.repo, Path(folder), options.revision)
        following = convert(
            argparse.Namespace(**chosen, path=Path(folder), source="peft", output=options.output), options.repo
        )
    print(f"converted from PEFT, commit {commit[:12]} of {options.repo}\n\n{following}")
    return 0
