"""Connection to the Hugging Face Hub: names of repositories, files in its cache, and one-line errors."""

import re
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils.tqdm import disable_progress_bars

from randlora_pl.utils import __version__
from randlora_pl.utils.errors import UserError

_LOGIN = "hf auth login, or set HF_TOKEN"


class PeftRepositoryError(UserError):
    """Error for a repository with an adapter of PEFT, which needs its base model to be converted."""


def names_repo(text: str) -> bool:
    """Return True if a text has the form of a repository's name, USER/NAME."""
    return len(text) <= 96 and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) is not None


def check_repo(repo: str) -> str:
    """Check and return the name of a repository.

    Raises:
        UserError: The name is not USER/NAME.
    """
    if not names_repo(repo):
        hint = re.sub(r"^https?://[^/]+/", "", repo).strip("/")
        near = f" Did you mean {hint}?" if "://" in repo and hint.count("/") == 1 else ""
        raise UserError(f"{repo!r} is not a repository of the Hub. Use USER/NAME.{near}")
    return repo


def check_files(repo: str, there: Collection[str], needed: Collection[str]) -> None:
    """Refuse a repository without the needed files of an adapter.

    Raises:
        PeftRepositoryError: It has an adapter of PEFT.
        UserError: It has a pickle, or something else.
    """
    if set(needed) <= set(there):
        return
    if "adapter_model.safetensors" in there:
        raise PeftRepositoryError(
            f"{repo} is an adapter of PEFT. Convert it: randlora-pl adapter pull {repo} --output ADAPTER"
        )
    if "adapter_model.bin" in there:
        raise UserError(
            f"{repo} is a PEFT adapter with its tensors as a pickle (adapter_model.bin), which can run code. If you "
            "trust it, load it with PEFT, save it again, and use adapter import."
        )
    listed = ", ".join(sorted(there)[:6]) or "nothing"
    raise UserError(f"{repo} has no adapter of randlora-pl ({' and '.join(sorted(needed))}); it has {listed}.")


def cached_files(repo: str, needed: Collection[str], more: Collection[str], revision: str | None = None) -> Path:
    """Return the folder in the client's cache with files of a repository; only files that changed are downloaded.

    Without a network, with HF_HUB_OFFLINE, or if the Hub refuses, the files of an earlier call are returned.

    Raises:
        UserError: The Hub is unreachable or refuses, or a needed file is missing.
    """
    with explain_errors(repo, revision):
        api = connect()
        folder = Path(api.snapshot_download(repo, revision=revision, allow_patterns=[*needed, *more]))
        if any(not (folder / name).is_file() for name in needed):
            siblings = api.model_info(repo, revision=revision).siblings or []
            check_files(repo, [sibling.rfilename for sibling in siblings], needed)
    return folder


def connect() -> huggingface_hub.HfApi:
    """Return a client, whose bars are shown in a terminal only."""
    if not sys.stderr.isatty():
        disable_progress_bars()
    return huggingface_hub.HfApi(library_name="randlora-pl", library_version=__version__)


@contextmanager
def explain_errors(repo: str, revision: str | None) -> Iterator[None]:
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
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    hub = constants.ENDPOINT
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no branch, tag or commit {revision or 'main'!r}; see {hub}/{repo}/tree/main"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: ask for access at {hub}/{repo}, then log in: {_LOGIN}"
    if isinstance(error, ValueError) and "README.md" in str(error):
        return f"{hub} refuses the card ({_line(str(error))}): edit it with --license or --card."
    answered = next((link for link in chain if isinstance(link, errors.HfHubHTTPError)), None)
    if answered is not None:
        status = answered.response.status_code
        if status == 401 and huggingface_hub.get_token() is not None and "Repository" not in str(answered):
            return f"{hub} does not accept the token (401): it is mistyped or expired. Log in again: {_LOGIN}"
        if status in (401, 404):
            login = "" if huggingface_hub.get_token() is not None else f" You are not logged in: {_LOGIN}"
            return f"{hub} has no model {repo} ({status}), or it is private and not shared with you.{login}"
        if status == 403:
            return f"{hub} does not allow this for {repo} (403). Use a token with write access, and your own user name."
        return f"{hub} refuses ({status}): {_line(answered.server_message or str(answered))}"
    if any(isinstance(link, errors.OfflineModeIsEnabled) for link in chain):
        return "HF_HUB_OFFLINE is set, so the Hub is not used. Unset it to load, push or pull adapters."
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if kinds & {"TransportError", "ConnectionError", "TimeoutError"}:  # of httpx, requests, sockets
        what = _line(str(chain[-1]))
        more = " HF_HUB_DISABLE_XET=1 sends files without Xet, which this server may not have." if "xet" in what else ""
        return f"{hub} cannot be reached ({what}). Check the network, or set HF_ENDPOINT to another server.{more}"
    if isinstance(error, OSError) and error.errno is None:  # from the client, not the disk
        return f"{hub} does not answer like the Hub: {_line(str(error))}"
    return None


def _line(text: str) -> str:
    """Return an error's text on one line, short enough for a message."""
    return " ".join(text.split())[:200].rstrip(".")
