"""Files of the Hugging Face Hub: one try, and no code of a repository runs."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from randlora_pl.utils.errors import UserError, first_line

_TRY = "thrown while requesting"
_WAITS = ("HTTP Error", "Retrying in ", "Rate limited")


@contextmanager
def asking_hub() -> Iterator[None]:
    """Ask the Hugging Face Hub once: without a network, everything inside fails at once and without a log line.

    huggingface_hub would try six times for each file, with two messages per try. A server that answers, but with an
    error, is asked again, with one message. The filter is on the logger that emits the messages, because filters of
    parent loggers do not apply to them.
    """
    from huggingface_hub import constants

    offline, reported = constants.HF_HUB_OFFLINE, False

    def hold(record: logging.LogRecord) -> bool:
        nonlocal reported
        message, error = record.getMessage(), sys.exc_info()[1]
        if _TRY in message and error is not None:  # a server that cannot be reached
            constants.HF_HUB_OFFLINE = True
            raise error
        if not message.startswith(_WAITS):
            return True
        if not reported:
            reported = True
            logging.getLogger("randlora_pl").warning("The Hugging Face Hub is busy; trying again.")
        return False

    library = logging.getLogger("huggingface_hub.utils._http")
    library.addFilter(hold)
    try:
        yield
    finally:
        library.removeFilter(hold)
        constants.HF_HUB_OFFLINE = offline


@contextmanager
def no_code_of_others() -> Iterator[None]:
    """Let transformers refuse a repository that needs code of its own, instead of asking in the terminal to run it."""
    from transformers import dynamic_module_utils

    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


def hub_file(repository: str, name: str, revision: str | None, option: str) -> Path | None:
    """Return a file of a repository, from the cache or downloaded; None if the repository does not have it.

    Args:
        repository: ``ORG/NAME``.
        name: Name of the file.
        revision: Branch, tag or commit; None for the default branch.
        option: Option that names the repository, for messages.

    Raises:
        UserError: The repository is unknown, private, gated or cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"https://huggingface.co/{repository}"
    try:
        with asking_hub():
            return Path(hf_hub_download(repository, name, revision=revision))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{option}: {name} of {repository} is not in the cache, and the Hugging Face Hub cannot be reached. Run "
            "once with a network, or download the repository and pass local-dir:FOLDER."
        ) from error
    except EntryNotFoundError:
        return None
    except GatedRepoError as error:
        raise UserError(
            f"{option}: {repository} is gated: accept its licence at {where}, then log in with `hf auth login` or set "
            "HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{option}: the Hugging Face Hub has no model {repository}, or it is private. Check the name at {where}, "
            "or log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{option}: {repository} has no revision {revision!r}. See {where}/tree/main.") from error
    except HFValidationError as error:
        raise UserError(f"{option}: {repository!r} is not a repository of the Hub. Use hf-hub:ORG/NAME.") from error
    except Exception as error:  # the HTTP client, the disk and Xet raise different types
        raise UserError(
            f"{option}: {name} of {repository} cannot be downloaded ({first_line(error)}). Run the command again, or "
            "download the repository and pass local-dir:FOLDER."
        ) from error
