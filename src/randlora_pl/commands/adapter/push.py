"""``adapter push``: an adapter to the Hugging Face Hub, with a model card."""

import argparse
from pathlib import Path

from randlora_pl.commands.common.arguments import CommandParser, check_parent
from randlora_pl.run.options.adapter_config import check_adapter
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import write_text
from randlora_pl.utils.files.run_files import find_adapter
from randlora_pl.utils.text.formatting import printable

PAGE = """\
Upload an adapter to the Hugging Face Hub with a model card: base model, classes, metrics, how to use and train it.
The metrics and the config come from the adapter's run folder. Local paths are not uploaded.

  randlora-pl adapter push RUN/adapter --repo USER/NAME --dry-run      print the upload, without a network
  randlora-pl adapter push RUN/adapter --repo USER/NAME --card card.md     write the card so that you can edit it
  randlora-pl adapter push RUN/adapter --repo USER/NAME --card card.md     the second time: upload

  --repo USER/NAME     The repository, which is created if it does not exist
  --private            Make it private. Fails if a public repository with that name exists
  --revision BRANCH    Branch, which is created if it does not exist (default: main)
  --licence SPDX       Licence of the adapter in the card, for example apache-2.0
  --message TEXT       Commit message
  --card FILE          Upload this card. If the file does not exist yet, write the card to it and upload nothing
  --dry-run            Print the files and the card, without uploading or writing

Log in first: run hf auth login, or set HF_TOKEN. HF_ENDPOINT names another server.
"""


def _parse(args: list[str]) -> argparse.Namespace:
    parser = CommandParser("adapter push")
    parser.add_argument("adapter", type=find_adapter)
    parser.add_argument("--repo", required=True)
    parser.add_argument("--licence", "--license")
    parser.add_options(private=False, revision=str, message="Add adapter", card=Path, dry_run=False)
    options = parser.parse_args(args)
    if not options.message.strip():
        raise UserError("--message is empty: describe in a few words what changed.")
    return options


def push_verb(args: list[str]) -> int:
    """Check the adapter, write or read the card, and send both."""
    options = _parse(args)
    check_adapter(options.adapter)
    from tempfile import TemporaryDirectory

    from randlora_pl.adapters import read_adapter
    from randlora_pl.interop.hub.model_card import make_card
    from randlora_pl.interop.hub.transfer import check_repo, push_folder, stage

    check_repo(options.repo)
    file = read_adapter(options.adapter)
    if options.card is not None and options.card.exists():
        card = _read(options.card)
    else:
        card = make_card(file, options.repo, options.licence)
        if options.card is not None and not options.dry_run:
            check_parent(options.card)
            write_text(options.card, card)
            print(f"{options.card}: the card, not uploaded yet. Edit it, then run the same command again to upload it.")
            return 0
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "files"
        stage(options.adapter, folder, card)
        sizes = {entry.name: entry.stat().st_size for entry in sorted(folder.iterdir())}
        if options.dry_run:
            print(f"would be uploaded to {options.repo}{f', branch {options.revision}' if options.revision else ''}:")
            print("\n".join(f"  {name:22} {size:>13,} bytes" for name, size in sizes.items()))
            print(f"\nREADME.md:\n\n{printable(card)}", end="")
            return 0
        address = push_folder(
            folder, options.repo, private=options.private, revision=options.revision, message=options.message
        )
    print(f"{address}: {len(sizes)} files, {sum(sizes.values()):,} bytes")
    if sha := file.config.get("base_model", {}).get("sha256"):
        print(f"the weights of its base model are your own file, which is not uploaded (SHA-256 {sha})")
    branch = f" --revision {options.revision}" if options.revision else ""
    print(f"\nNext: randlora-pl adapter pull {options.repo}{branch} --output {options.repo.rpartition('/')[2]}")
    return 0


def _read(card: Path) -> str:
    try:
        return card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{card} cannot be read as text ({type(error).__name__}); name another --card.") from error
