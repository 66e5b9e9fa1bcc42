"""``doctor``: installed, found and reachable parts, and the command that repairs each missing one."""

import importlib.util
import os
import platform
import re
import shutil
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from randlora_pl.commands.common.arguments import print_json
from randlora_pl.commands.common.tables import entry
from randlora_pl.language.dataset_facts import datasets
from randlora_pl.utils.files.documents import parse_json
from randlora_pl.utils.option_types import Json
from randlora_pl.utils.text.formatting import byte_size
from randlora_pl.utils.version import __version__

PACKAGES = (
    "torch", "lightning", "torchmetrics", "open_clip_torch", "timm", "torchvision", "jsonargparse", "tensorboard",
)  # fmt: skip
OPTIONAL = {
    "wandb": ("--run.logger wandb", "wandb"),
    "mlflow": ("--run.logger mlflow", "mlflow"),
    "datasets": ("--data.dataset hf", "hf"),
    "pyarrow": ("tables as Parquet files", "parquet"),
    "transformers": ("--model CausalLMTask and TextClassificationTask", "language"),
    "bitsandbytes": ("--model.quantize, on a GPU", "quantize"),
    "liger-kernel": ("--model.liger, on a GPU", "liger"),
    "triton": ("RandLoRA's own kernels on a GPU (CUDA builds of PyTorch bring it)", "triton"),
    "onnxruntime": ("adapter export --to onnx", "onnx"),
}
"""Purpose and extra of each optional package, by name."""

HERE = re.compile("(?<!not )cached|bundled")

_TIMEOUT = 3.0


def doctor(*, all: bool = False, json: Json = False) -> int:
    """Check if a run can start here, and what is missing.

    Then print versions, devices, data, cached weights and network.

    Args:
        all: Also list datasets and weights that are not on this machine, and how to get them
    """
    sections = {"Versions": versions, "Devices": devices, "Data sets": datasets, "Network": network}
    report = {}
    for title, section in (sections | {"Weights": weights, "Folders": folders}).items():
        try:
            report[title] = section()
        except Exception as error:
            report[title] = {"BROKEN": f"{type(error).__name__}: {error}. Reinstall that package"}
    if json:
        print_json({"verdict": verdict(report), **report})
        return 0
    print(f"{verdict(report)}\n")
    for title, found in report.items():
        shown = found if all else _summary(found)
        print("\n".join([title, *(entry(name, text, column=28) for name, text in shown.items()), ""]))
    return 0


def verdict(report: dict[str, dict[str, str]]) -> str:
    """Return in one line whether a run can start here, and what stops it."""
    wrong = [
        f"{name} {text}"
        for found in report.values()
        for name, text in found.items()
        if name == "BROKEN" or text.startswith("MISSING") or "cannot be written" in text
    ]
    faster = [f"{name} ({text})" for name, text in report["Devices"].items() if name.startswith(("cuda", "mps"))]
    return f"NOT READY: {'; '.join(wrong)}" if wrong else f"READY: runs use {faster[0] if faster else 'the CPU'}."


def _summary(found: dict[str, str]) -> dict[str, str]:
    """Return the entries that are here, and the number of the others."""
    here = {
        name: text
        for name, text in found.items()
        if not re.match("missing: |(.*: )?not cached", text) or HERE.search(text)
    }
    absent = len(found) - len(here)
    return here | ({f"{absent} not downloaded": "to list them: randlora-pl doctor --all"} if absent else {})


def versions() -> dict[str, str]:
    """Return the versions of installed packages, and the install commands of missing optional ones."""
    found = {"randlora-pl": __version__, "python": f"{platform.python_version()} on {platform.platform()}"}
    absent = {package: f"MISSING: pip install {package}" for package in PACKAGES}
    for package, (use, extra) in OPTIONAL.items():
        absent[package] = f"not installed; for {use}: pip install '.[{extra}]' in the checkout"
    for package, text in absent.items():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = text
    return found


def devices() -> dict[str, str]:
    """Return the accelerators with their memory, and the CPU."""
    import torch

    found = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used by PyTorch"}
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = f"{properties.name}, {byte_size(properties.total_memory)}"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    if len(found) == 1:
        kind = "no accelerator is seen"
        build = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        found["accelerator"] = f"{kind} (PyTorch {torch.__version__}, {build}); runs use the CPU"
    return found


def network() -> dict[str, str]:
    """Return the state of the connection to the model hub."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "ON", "YES"):
        return {hub: "OFFLINE: HF_HUB_OFFLINE is set; only weights that are cached or in a file can be used"}
    try:
        with urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=_TIMEOUT):
            return {hub: "reachable"}
    except urllib.error.HTTPError as error:  # it answers, even if with a refusal
        return {hub: f"answers with {error.code}; if downloads fail, see HTTPS_PROXY and HF_ENDPOINT"}
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return {hub: f"OFFLINE ({reason}): only cached weights or a file (--model.pretrained FILE) work"}


def weights() -> dict[str, str]:
    """Return the cached weights of the catalog and of the language models, without importing transformers."""
    from randlora_pl.language.catalog import KNOWN
    from randlora_pl.models.catalog import MODELS

    found = {}
    for row in MODELS:
        states = {tag: "cached" if cached(row.library, row.name, tag) else "not cached" for tag in row.tags}
        states = dict.fromkeys(row.tags, "bundled") if row.name == "tiny" else states
        found[row.name] = ", ".join(f"{tag}: {state}" for tag, state in states.items())
    for name, known in KNOWN.items():
        gate = f"; gated: accept its licence at https://huggingface.co/{name}, then hf auth login"
        here = any(map(is_whole, snapshots(name)))
        found[name] = "cached" if here else "not cached" + (gate if known.gated else "")
    if importlib.util.find_spec("transformers") is None:
        found["language models"] = f"need transformers: pip install '.[{OPTIONAL['transformers'][1]}]' in the checkout"
    return found


def folders() -> dict[str, str]:
    """Return the folders of data, cache and runs, and the free disk space."""
    from huggingface_hub import constants

    from randlora_pl.data.catalog.registry import default_root
    from randlora_pl.utils.machine import cache_folder

    here = {"datasets": default_root(), "weights": Path(constants.HF_HUB_CACHE), "text heads": cache_folder()}
    found = {name: str(folder) for name, folder in here.items()}
    free = shutil.disk_usage(Path.cwd()).free
    writable = os.access(Path.cwd(), os.W_OK)
    runs = f"{Path.cwd() / 'runs'}, {byte_size(free)} free"
    return found | {"runs": runs if writable else f"{Path.cwd()} cannot be written: use --run.root FOLDER"}


def is_whole(snapshot: Path) -> bool:
    """Return True if a folder has all weights of a language model, in one file or in all files of an index."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = snapshot / f"{name}.index.json"
        if (snapshot / name).is_file():
            return True
        if index.is_file():
            try:
                parts = parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()
                return all((snapshot / part).is_file() for part in parts)
            except (OSError, ValueError, KeyError, TypeError, AttributeError):  # cut off or damaged
                return False
    return False


def cached(library: str, name: str, tag: str) -> bool:
    """Return True if the weights of a tag of ``open_clip`` or ``timm`` are in the hub's cache."""
    if library == "timm":
        repository = f"timm/{name}.{tag}"
    else:
        from open_clip import get_pretrained_cfg

        repository = str(get_pretrained_cfg(name, tag).get("hf_hub", "")).rstrip("/")
    return bool(repository) and any(any(folder.iterdir()) for folder in snapshots(repository))


def snapshots(repository: str) -> list[Path]:
    """Return the folders of the hub's cache that hold a version of a repository."""
    from huggingface_hub import constants

    held = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots"
    return [folder for folder in held.glob("*") if folder.is_dir()]
