"""Upload and download of adapters on the Hugging Face Hub, with one-line errors."""

import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from randlora_pl.adapters import AdapterFile, read_adapter
from randlora_pl.adapters.io.container import BASES, CONFIG, TENSORS
from randlora_pl.adapters.io.save_load import copy_adapter
from randlora_pl.interop.peft import files as peft
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import atomic_folder, disk_errors
from randlora_pl.utils.version import __version__

CARD = "README.md"
_LOGIN = "hf auth login, or set HF_TOKEN"


class PeftRepositoryError(UserError):
    """Error for a repository with an adapter of PEFT, which needs its base model to be converted."""


@dataclass(frozen=True)
class Pulled:
    """Downloaded and verified adapter, commit hash in its repository, and total bytes of its files."""

    file: AdapterFile
    commit: str
    size: int


def check_repo(repo: str) -> str:
    """Check and return the name of a repository.

    Raises:
        UserError: The name is not USER/NAME.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo) or len(repo) > 96:
        hint = re.sub(r"^https?://[^/]+/", "", repo).strip("/")
        near = f" Did you mean {hint}?" if "://" in repo and hint.count("/") == 1 else ""
        raise UserError(f"{repo!r} is not a repository of the Hub. Use USER/NAME.{near}")
    return repo


def stage(path: Path, folder: Path, card: str) -> None:
    """Write the upload to a new folder: the adapter without local paths, and the text of its model card."""
    copy_adapter(path, folder)
    (folder / CARD).write_text(card, encoding="utf-8")


def push_folder(
    folder: Path, repo: str, *, private: bool = False, revision: str | None = None, message: str = "Add adapter"
) -> str:
    """Upload the files of a folder as one commit, and return its URL; create the repository and branch if needed.

    Raises:
        UserError: The Hub is unreachable or refuses, or the repository is public despite ``private``.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = sorted(file for file in folder.iterdir())
    with _explained(repo, revision):
        api = _api()
        api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        info = api.model_info(repo, revision=revision)
        if private and not info.private:
            raise UserError(f"{repo} exists and is public, so nothing was sent. Make it private in its settings.")
        there = {sibling.rfilename for sibling in info.siblings or []}
        operations: list[Any] = [CommitOperationAdd(file.name, str(file)) for file in files]
        if BASES in there - {file.name for file in files}:  # of an older adapter
            operations.append(CommitOperationDelete(BASES))
        return str(api.create_commit(repo, operations, commit_message=message, revision=revision).commit_url)


def pull_adapter(repo: str, path: Path, revision: str | None = None) -> Pulled:
    """Download an adapter and verify it before it replaces an older one. Only files without code are downloaded.

    Raises:
        UserError: The Hub is unreachable or refuses, or the adapter is missing or damaged. No files remain.
    """
    with disk_errors(path), atomic_folder(path) as folder:
        with _explained(repo, revision):
            api = _api()
            info = api.model_info(repo, revision=revision)
            there = {sibling.rfilename for sibling in info.siblings or []}
            if not there >= {CONFIG, TENSORS}:
                if "adapter_model.safetensors" in there:
                    raise PeftRepositoryError(
                        f"{repo} is an adapter of PEFT. Convert it: randlora-pl adapter pull {repo} --output ADAPTER"
                    )
                if "adapter_model.bin" in there:
                    raise UserError(
                        f"{repo} is a PEFT adapter with its tensors as a pickle (adapter_model.bin), which can run "
                        "code. If you trust it, load it with PEFT, save it again, and use adapter import."
                    )
                listed = ", ".join(sorted(there)[:6]) or "nothing"
                raise UserError(f"{repo} has no adapter of randlora-pl ({CONFIG} and {TENSORS}); it has {listed}.")
            commit = str(info.sha)
            for name in sorted({CONFIG, TENSORS, BASES, CARD} & there):
                api.hf_hub_download(repo, name, revision=commit, local_dir=folder)
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        read_adapter(folder, repo)
        size = sum(file.stat().st_size for file in folder.iterdir())
    return Pulled(read_adapter(path), commit, size)


def download_peft(repo: str, folder: Path, revision: str | None = None) -> str:
    """Download the files of a PEFT adapter to a folder, and return the commit. Only files without code are downloaded.

    Raises:
        UserError: The Hub is unreachable or refuses.
    """
    with disk_errors(folder), _explained(repo, revision):
        api = _api()
        info = api.model_info(repo, revision=revision)
        there = {sibling.rfilename for sibling in info.siblings or []}
        for name in sorted({peft.CONFIG, peft.TENSORS, peft.TASK, peft.HEAD} & there):
            api.hf_hub_download(repo, name, revision=str(info.sha), local_dir=folder)
    return str(info.sha)


def _api() -> Any:
    import huggingface_hub
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    return huggingface_hub.HfApi(library_name="randlora-pl", library_version=__version__)


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Convert Hub and network errors to one-line errors; raise others unchanged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about the card, which its page shows as well
            yield
    except UserError:
        raise
    except Exception as error:
        text = _explanation(error, repo, revision)
        if text is None:
            raise
        raise UserError(text) from error


def _explanation(error: Exception, repo: str, revision: str | None) -> str | None:
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    hub = constants.ENDPOINT
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no branch, tag or commit {revision or 'main'!r}; see {hub}/{repo}/tree/main"
    if isinstance(error, ValueError) and "README.md" in str(error):
        return f"{hub} refuses the card ({_line(str(error))}): edit it with --licence or --card."
    answered = next((link for link in chain if isinstance(link, HfHubHTTPError)), None)
    if answered is not None:
        status = answered.response.status_code
        if status == 401 and get_token() is not None and "Repository" not in str(answered):
            return f"{hub} does not accept the token (401): it is mistyped or expired. Log in again: {_LOGIN}"
        if status in (401, 404):
            login = "" if get_token() is not None else f" You are not logged in: {_LOGIN}"
            return f"{hub} has no model {repo} ({status}), or it is private and not shared with you.{login}"
        if status == 403:
            return f"{hub} does not allow this for {repo} (403). Use a token with write access, and your own user name."
        return f"{hub} refuses ({status}): {_line(answered.server_message or str(answered))}"
    if any(isinstance(link, OfflineModeIsEnabled) for link in chain):
        return "HF_HUB_OFFLINE is set, so the Hub is not used. Unset it for adapter push and adapter pull."
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if kinds & {"TransportError", "ConnectionError", "TimeoutError"}:  # of httpx, requests, sockets
        what = _line(str(chain[-1]))
        more = " HF_HUB_DISABLE_XET=1 sends files without Xet, which this server may not have." if "xet" in what else ""
        return f"{hub} cannot be reached ({what}). Check the network, or set HF_ENDPOINT to another server.{more}"
    if isinstance(error, OSError) and error.errno is None:  # from the client, not the disk
        return f"{hub} does not answer as the Hub does: {_line(str(error))}"
    return None


def _line(text: str) -> str:
    """Return an error's text on one line, short enough for a message."""
    return " ".join(text.split())[:200].rstrip(".")
