"""Commands that list methods, datasets and models without PyTorch or explain methods, and ``doctor``."""

import ast
import difflib
import importlib.util
import os
import platform
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, groupby
from pathlib import Path
from typing import Annotated, Any, TypeVar

from randlora_pl.commands import data
from randlora_pl.commands.common import entry, print_json
from randlora_pl.commands.fit import describe
from randlora_pl.data.catalog import CATALOG, default_root
from randlora_pl.language import offline
from randlora_pl.language.catalog import DATASETS, KNOWN, LABELLED
from randlora_pl.models.catalog import MODELS, matrix
from randlora_pl.run.options.classes import classes, options_of, summary
from randlora_pl.utils import __version__
from randlora_pl.utils.errors import UserError, install, near
from randlora_pl.utils.files import parse_json
from randlora_pl.utils.machine import cache_folder
from randlora_pl.utils.options import Json, Option, Root
from randlora_pl.utils.text import byte_size, table

Row = TypeVar("Row")

Names = Annotated[Sequence[str], Option("NAME")]


def adapters(names: Names = (), *, json: Json = False) -> int:
    """List the methods, or explain the options of some of them.

    Examples:
        randlora-pl adapters
        randlora-pl adapters RandLoRA

    Args:
        names: Methods to explain
        json: Print the result as JSON, with all options
    """
    if not (names or json):
        rows = []
        for group, methods in groupby(sorted(_methods(), key=lambda row: (row[0], row[1].lower())), lambda row: row[0]):
            rows += [(group, ""), *((f"  {name}", text) for _, name, text in methods)]
        print(table(("adapter", "what it is"), rows))
        print("\nUse: randlora-pl fit --config CONFIG --model.adapter NAME. Its options: randlora-pl adapters NAME")
        return 0
    listed = {name: name for _, name, _ in _methods()}
    chosen = [_pick(name, listed, "adapter") for name in names] or list(classes("model.adapter"))
    kinds = [classes("model.adapter")[name] for name in chosen]
    if json:
        facts = []
        for kind in kinds:
            own = options_of(kind).values()
            options = {each.name: {"type": each.choices, "default": each.written, "help": each.help} for each in own}
            facts.append({"name": kind.__name__, "summary": summary(kind), "options": options})
        return print_json(facts)
    for kind in kinds:
        print(describe(kind, "--model.adapter."))
    return 0


def _methods() -> Iterator[tuple[str, str, str]]:
    """Yield group, name and summary of each method, from the source text, which takes no seconds of imports."""
    folder = Path(__file__).parents[1] / "adapters"
    files = [folder / "base.py", *folder.glob("methods/*.py")]
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    nodes = {node.name: node for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef)}

    def group(name: str) -> str:
        node = nodes.get(name, nodes["Adapter"])
        for item in node.body:
            if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == "group":
                return str(ast.literal_eval(item.value))
        return group(ast.unparse(node.bases[0]))

    public = next(item for item in trees[folder / "methods" / "__init__.py"].body if isinstance(item, ast.Assign))
    for name in ast.literal_eval(public.value):
        yield group(name), name, (ast.get_docstring(nodes[name]) or "").partition("\n")[0]


def datasets(names: Names = (), *, root: Root = None, json: Json = False) -> int:
    """List the datasets, or show some of them in full.

    Examples:
        randlora-pl datasets
        randlora-pl datasets eurosat

    Args:
        names: Datasets to show
        root: Folder to search for the data (default: the user's data folder)
    """
    folder = default_root() if root is None else Path(root).expanduser()
    if root is not None and not folder.is_dir():
        raise UserError(f"--root {folder} is not a folder; give the folder with the datasets")
    if not names:
        rows = []
        for row in CATALOG.values():
            counts = [row.counts.get(split) for split in ("train", "val", "test")]
            rows.append(
                (row.name, row.classes, *counts, row.epochs, data.state_of(row, folder), row.license, row.title)
            )
        header = ("dataset", "classes", "train", "val", "test", "epochs", "on this machine", "license", "what it is")
        if json:
            return print_json([dict(zip(header, row, strict=True)) for row in rows])
        print(table(header, rows, optional=("license", "epochs", "classes", "val")))
        print(f"\nOn this machine: below {folder}. Another folder: randlora-pl datasets --root PATH")
        print(
            "Use: randlora-pl fit --config CONFIG --data.dataset NAME. Details of a dataset: randlora-pl datasets NAME"
        )
        print("Download: randlora-pl data get NAME. It prints the steps of what must be downloaded by hand")
        print(
            "Your own images: --data.dataset folder, table, hf, webdataset or pairs with --data.root PATH; see "
            "docs/your_own_data.md"
        )
        print(f"Texts: --model CausalLMTask with {', '.join(DATASETS)}")
        print(f"       --model TextClassificationTask with {', '.join(LABELLED)}; see {' and '.join(data.TEXT_PAGES)}")
        return 0
    sections = {name: data.dataset_facts(name, folder) for name in names}
    if json:
        return print_json(sections)
    for name, facts in sections.items():
        lines = [entry(key, value, column=14) for each in facts for key, value in each.items() if value]
        print("\n".join([name, *lines, ""]))
    return 0


def models(names: Names = (), *, all: bool = False, json: Json = False) -> int:
    """List backbones with their sizes, weights and configs, or some of them.

    Examples:
        randlora-pl models
        randlora-pl models ViT-B-32

    Args:
        names: Models to list
        all: Every architecture of open_clip and timm: what is adapted, and if preprocessing is the library's
    """
    rows: dict[str, tuple[Any, ...]] = {
        row.name: (row.name, row.library, row.config, row.parameters, row.image_size, ", ".join(row.tags), row.license)
        for row in MODELS
    }
    rows |= {
        name: (name, "transformers", known.config, known.parameters, "text", "its own", known.license)
        for name, known in KNOWN.items()
    }
    if all:
        rows_of: dict[str, list[dict[str, str]]] = {}
        for each in matrix():
            rows_of.setdefault(each["name"], []).append(each)
        picked = [_pick(name.partition(".")[0], rows_of, "model", "models --all") for name in names]
        listed = list(chain(*picked)) or matrix()
        if json:
            return print_json(listed)
        methods = {name for _, name, _ in _methods()}
        cells = []
        for row in listed:
            adapted = " / ".join(row[method] or "-" for method in row if method in methods)
            equal = f"{row['equal']} of {row['tags']}" if row["tags"] != "0" else "no weights"
            why = row["refused"] or "; ".join(
                filter(None, [row["hub"] and f"not checked without the hub: {row['hub']}", row["frozen"]])
            )
            cells.append((row["name"], row["library"], adapted, equal, why))
        columns = ("model", "library", "adapted, %", "preprocessing", "frozen, % / why not")
        print(table(columns, cells, optional=("library",)))
        print(
            "\nadapted: RandLoRA / LoRA / DoRA by default, of the weights of the blocks. preprocessing: pretrained "
            "weights with the library's own, of all. More: docs/model_matrix.md"
        )
        return 0
    chosen = [_pick(name, rows, "model") for name in names] or list(rows.values())
    header = ("model", "library", "config", "parameters", "pixels", "weights", "license")
    if json:
        return print_json([dict(zip(header, row, strict=True)) for row in chosen])
    cells = [(*row[:3], f"{row[3] / 1e6:,.1f} M", *row[4:]) for row in chosen]
    print(table(header, cells, optional=("pixels", "library") if names else ("license", "pixels", "library")))
    print("\nUse: randlora-pl fit --config CONFIG, or --model.name NAME --model.pretrained TAG, a file or random")
    return 0


def _pick(name: str, known: dict[str, Row], what: str, listed: str = "") -> Row:
    """Return the row of a name, ignoring case, as ``fit`` does; ``listed``: command with all names."""
    word, spelled = name.lower(), {candidate.lower(): candidate for candidate in known}
    if word in spelled:
        return known[spelled[word]]
    parts = [  # also of a part of a name: ``qwen3`` of ``Qwen/Qwen2-0.5B-Instruct``
        choice
        for choice in known
        if word in choice.lower() or difflib.get_close_matches(word, re.split(r"[/_.-]", choice.lower()), 1, 0.7)
    ]
    hint = near(name, known) or (f" Did you mean {' or '.join(map(repr, parts[:3]))}?" if parts else "")
    raise UserError(f"Unknown {what} {name!r}.{hint} See: randlora-pl {listed or f'{what}s'}")


PACKAGES = (
    "torch", "lightning", "torchmetrics", "open_clip_torch", "timm", "torchvision", "jsonargparse", "tensorboard",
)  # fmt: skip
OPTIONAL = {
    "wandb": ("--run.logger wandb", "wandb"),
    "mlflow": ("--run.logger mlflow", "mlflow"),
    "datasets": ("--data.dataset hf", "hf"),
    "pyarrow": ("tables as Parquet files", "parquet"),
    "transformers": ("--model CausalLMTask and TextClassificationTask", "language"),
    "gguf": ("--model.name smollm2", "language-offline"),
    "torchao": ("--model.quantize int8 and int4", "torchao"),
    "bitsandbytes": ("--model.quantize 8bit and 4bit, on a GPU", "quantize"),
    "liger-kernel": ("--model.liger, on a GPU", "liger"),
    "triton": ("RandLoRA's own kernels on a GPU (CUDA builds of PyTorch bring it)", "triton"),
    "onnxruntime": ("adapter export --to onnx", "onnx"),
}
"""Purpose and extra of each optional package, by name."""


def doctor(*, all: bool = False, json: Json = False) -> int:
    """Check if a run can start here, and what is missing.

    Then print versions, devices, data, cached weights and network.

    Args:
        all: Also list datasets and weights that are not on this machine, and how to get them
    """
    sections = {"Versions": versions, "Devices": devices, "Data sets": data.datasets, "Network": network}
    report = {}
    for title, section in (sections | {"Weights": weights, "Folders": folders}).items():
        try:
            report[title] = section()
        except Exception as error:
            report[title] = {"BROKEN": f"{type(error).__name__}: {error}. Reinstall that package"}
    wrong = [
        f"{name} {text}"
        for facts in report.values()
        for name, text in facts.items()
        if name == "BROKEN" or text.startswith("MISSING") or "cannot be written" in text
    ]
    faster = [f"{name} ({text})" for name, text in report["Devices"].items() if name.startswith(("cuda", "mps"))]
    ready = f"READY: runs use {faster[0] if faster else 'the CPU'}."
    verdict = f"NOT READY: {'; '.join(wrong)}" if wrong else ready
    if json:
        return print_json({"verdict": verdict, **report})
    print(f"{verdict}\n")
    for title, facts in report.items():
        here = {
            name: text
            for name, text in facts.items()
            if all or not re.match("missing: |(.*: )?not cached", text) or re.search("(?<!not )cached|bundled", text)
        }
        if absent := len(facts) - len(here):
            here[f"{absent} not downloaded"] = "to list them: randlora-pl doctor --all"
        print("\n".join([title, *(entry(name, text, column=28) for name, text in here.items()), ""]))
    return 0


def versions() -> dict[str, str]:
    """Return the versions of installed packages, and the install commands of missing optional ones."""
    states = {"randlora-pl": __version__, "python": f"{platform.python_version()} on {platform.platform()}"}
    absent = {package: f"MISSING: pip install {package}" for package in PACKAGES}
    for package, (use, extra) in OPTIONAL.items():
        absent[package] = f"not installed; for {use}: {install(extra)}"
    for package, text in absent.items():
        try:
            states[package] = version(package)
        except PackageNotFoundError:
            states[package] = text
    return states


def devices() -> dict[str, str]:
    """Return the accelerators with their memory, and the CPU."""
    import torch

    states = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used by PyTorch"}
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        states[f"cuda:{number}"] = f"{properties.name}, {byte_size(properties.total_memory)}"
    if torch.backends.mps.is_available():
        states["mps"] = "Apple GPU"
    if len(states) == 1:
        build = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        states["accelerator"] = f"no accelerator was found (PyTorch {torch.__version__}, {build}); runs use the CPU"
    return states


def network() -> dict[str, str]:
    """Return the state of the connection to the model hub."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "ON", "YES"):
        return {hub: "OFFLINE: HF_HUB_OFFLINE is set; only weights that are cached or in a file can be used"}
    try:
        with urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=3):
            return {hub: "reachable"}
    except urllib.error.HTTPError as error:  # it answers, even if with a refusal
        return {hub: f"answers with {error.code}; if downloads fail, see HTTPS_PROXY and HF_ENDPOINT"}
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return {hub: f"OFFLINE ({reason}): only cached weights or a file (--model.pretrained FILE) work"}


def weights() -> dict[str, str]:
    """Return the cached weights of the catalog and of the language models, without importing transformers."""
    entries = {}
    for row in MODELS:
        states = {tag: "cached" if cached(row.library, row.name, tag) else "not cached" for tag in row.tags}
        states = dict.fromkeys(row.tags, "bundled") if row.name == "tiny" else states
        entries[row.name] = ", ".join(f"{tag}: {state}" for tag, state in states.items())
    for name, known in KNOWN.items():
        gate = f"; gated: accept its license at https://huggingface.co/{name}, then hf auth login"
        here = offline.cached() if name == offline.NAME else any(map(is_whole, snapshots(name)))
        missing = f": {offline.DOWNLOAD}" if name == offline.NAME else gate if known.gated else ""
        entries[name] = "cached" if here else f"not cached{missing}"
    if importlib.util.find_spec("transformers") is None:
        entries["language models"] = f"need transformers: {install(OPTIONAL['transformers'][1])}"
    return entries


def folders() -> dict[str, str]:
    """Return the folders of data, cache and runs, and the free disk space."""
    from huggingface_hub import constants

    here = {"datasets": default_root(), "weights": Path(constants.HF_HUB_CACHE), "text heads": cache_folder()}
    places = {name: str(folder) for name, folder in here.items()}
    free = shutil.disk_usage(Path.cwd()).free
    writable = os.access(Path.cwd(), os.W_OK)
    runs = f"{Path.cwd() / 'runs'}, {byte_size(free)} free"
    return places | {"runs": runs if writable else f"{Path.cwd()} cannot be written: use --run.root FOLDER"}


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
