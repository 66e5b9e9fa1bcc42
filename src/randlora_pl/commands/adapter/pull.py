"""``adapter pull``: an adapter from the Hugging Face Hub."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from randlora_pl.commands.adapter.import_ import convert
from randlora_pl.commands.adapter.push import Repo
from randlora_pl.commands.common.arguments import check_output
from randlora_pl.language.catalog import TASKS, given_to
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.option_types import Folder, Option, Overwrite


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
        pulled = hub.pull_adapter(repo, output, revision)
    except hub.PeftRepositoryError:
        with TemporaryDirectory() as folder:
            commit = hub.download_peft(repo, Path(folder), revision)
            following = convert(Path(folder), "peft", output, name=repo)
        print(f"converted from PEFT, commit {commit[:12]} of {repo}\n\n{following}")
        return 0
    file, base = pulled.file, pulled.file.config.get("base_model", {})
    model = " ".join(str(base[key]) for key in ("library", "name", "pretrained") if base.get(key))
    classes = file.metadata.get("classnames") or []
    what = f" for {len(classes):,} classes" if classes else ""
    print(f"{output}: {file.adapter.method()} adapter of {model or 'a base model'}{what}")
    print(f"{pulled.size:,} bytes, commit {pulled.commit[:12]} of {repo}")
    if sha := base.get("sha256"):
        print(f"its base model needs the weights file {base.get('pretrained')} (SHA-256 {sha})")
    task = file.metadata.get("task")
    predicts = f"predict --adapter {output} {given_to(task)} --output predictions.csv"
    print(f"\nNext: randlora-pl {predicts if classes or task in TASKS else f'adapter info {output}'}")
    return 0
