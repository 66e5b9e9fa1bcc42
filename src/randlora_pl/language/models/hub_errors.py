"""Errors of transformers about unavailable files, as one line with the next step."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from randlora_pl.language.catalog import KNOWN
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.hub_files import asking_hub, no_code_of_others

INSTALL = "pip install '.[language]' in the checkout"


def need_transformers() -> None:
    """Raise an error with the command that installs the extra if it is missing."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError(f"Language models need the package transformers: {INSTALL}")


@contextmanager
def reached(source: str, option: str) -> Iterator[None]:
    """Turn errors of the search for a model, configuration or tokenizer into a `UserError`.

    Args:
        source: Name or folder of the model.
        option: Option that chose it.

    Raises:
        UserError: The model is gated, does not exist, or cannot be read.
    """
    need_transformers()
    try:
        with asking_hub(), no_code_of_others():
            yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # besides OSError, ValueError and KeyError, tokenizers raises plain exceptions
        chain: list[BaseException] = [error]
        while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
            chain.append(inner)
        gated = (
            f"is gated: accept its licence at https://huggingface.co/{source}, then log in with `hf auth login` or set "
            "HF_TOKEN."
        )
        if any("gated" in str(link).lower() or type(link).__name__ == "GatedRepoError" for link in chain):
            raise UserError(f"{source} {gated}") from error
        gated = f"\nIt {gated}" if source in KNOWN and KNOWN[source].gated else ""
        raise UserError(
            f"{source} cannot be loaded ({option}): {_reason(error)}. Give a folder with its files, a name "
            f"of the Hugging Face Hub with a network, or --model.pretrained random.{gated}"
        ) from error


def _reason(error: Exception) -> str:
    """Return the first line of an error's text, or all of it where that line only announces the others."""
    text = str(error).strip() or type(error).__name__
    announces = text.partition("\n")[0].endswith(":")
    return (" ".join(text.split()) if announces else text).splitlines()[0][:200].rstrip(".")
