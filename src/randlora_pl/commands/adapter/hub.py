"""``adapter push`` and ``adapter pull``: an adapter to the Hugging Face Hub, with a model card, and from it."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from randlora_pl.commands.adapter.import_ import convert
from randlora_pl.commands.common.terminal import check_output, check_parent
from randlora_pl.language.catalog import TASKS, given_to
from randlora_pl.run.options.adapter_config import check_adapter
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import write_text
from randlora_pl.utils.options import Adapter, File, Folder, Option, Overwrite
from randlora_pl.utils.text import printable

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
