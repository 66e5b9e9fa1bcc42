"""Upload and download of adapters on the Hugging Face Hub, with their model cards."""

import json
import re
import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from torch import Tensor

from randlora_pl.adapters import AdapterFile, read_adapter
from randlora_pl.adapters.save_load import BASES, CONFIG, TENSORS, copy_adapter
from randlora_pl.interop import base_model, external, peft_import
from randlora_pl.tasks import Objective, restore
from randlora_pl.utils.adapter_schema import method_label
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import atomic_folder, disk_errors, disk_size, parse_yaml
from randlora_pl.utils.hub import check_files, connect, explain_errors
from randlora_pl.utils.image_spec import ImageSpec
from randlora_pl.utils.text import byte_size
from randlora_pl.utils.weights_files import base_words, file_name, without_local_paths

CARD = "README.md"


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
    files = sorted(file for file in folder.iterdir())
    with explain_errors(repo, revision):
        api = connect()
        api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        info = api.model_info(repo, revision=revision)
        if private and not info.private:
            raise UserError(f"{repo} exists and is public, so nothing was sent. Make it private in its settings.")
        there = {sibling.rfilename for sibling in info.siblings or []}
        operations: list[Any] = [huggingface_hub.CommitOperationAdd(file.name, str(file)) for file in files]
        if BASES in there - {file.name for file in files}:  # of an older adapter
            operations.append(huggingface_hub.CommitOperationDelete(BASES))
        return str(api.create_commit(repo, operations, commit_message=message, revision=revision).commit_url)


def pull_adapter(repo: str, path: Path, revision: str | None = None) -> tuple[AdapterFile, str, int]:
    """Download an adapter and verify it before it replaces an older one. Only files without code are downloaded.

    Returns:
        The adapter, the commit in its repository, and the bytes of its files.

    Raises:
        UserError: The Hub is unreachable or refuses, or the adapter is missing or damaged. No files remain.
    """
    with disk_errors(path), atomic_folder(path) as folder:
        with explain_errors(repo, revision):
            api = connect()
            info = api.model_info(repo, revision=revision)
            there = {sibling.rfilename for sibling in info.siblings or []}
            check_files(repo, there, {CONFIG, TENSORS})
            commit = str(info.sha)
            for name in sorted({CONFIG, TENSORS, BASES, CARD} & there):
                api.hf_hub_download(repo, name, revision=commit, local_dir=folder)
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        read_adapter(folder, repo)
        size = disk_size(folder)
    return read_adapter(path), commit, size


def download_peft(repo: str, folder: Path, revision: str | None = None) -> str:
    """Download the files of a PEFT adapter to a folder, and return the commit. Only files without code are downloaded.

    Raises:
        UserError: The Hub is unreachable or refuses.
    """
    with disk_errors(folder), explain_errors(repo, revision):
        api = connect()
        info = api.model_info(repo, revision=revision)
        there = {sibling.rfilename for sibling in info.siblings or []}
        for name in sorted({peft_import.CONFIG, peft_import.TENSORS, external.TASK, peft_import.HEAD} & there):
            api.hf_hub_download(repo, name, revision=str(info.sha), local_dir=folder)
    return str(info.sha)


def make_card(file: AdapterFile, repo: str, license: str | None = None) -> str:
    """Return the text of ``README.md`` with the Hub's YAML header and without local paths.

    Inside a run folder, the run's metrics and config are used. ``license`` is an SPDX identifier (``apache-2.0``).

    Raises:
        UserError: A file of the run is damaged.
    """
    run, metadata = file.path.absolute().parent, file.metadata
    ours = file.path.name in ("adapter", "adapter-best") and (run / "config.yaml").is_file()
    results = _read(run / "results.json") if ours and file.path.name == "adapter" else {}
    config = _read(run / "config.yaml") if ours else {}
    frame = metadata.get("training", {}).get("frame")
    base, task = without_local_paths(file.config).get("base_model", {}), metadata.get("task")
    names, captions, method = metadata.get("classnames") or [], metadata.get("captions"), method_label(file.config)
    kind = restore.task_class(file)
    tag = None if not names else "zero-shot-image-classification" if captions else "image-classification"
    options = {name: value for name, value in file.adapter.options().items() if name in _SHOWN and value is not None}
    if isinstance(prompts := metadata.get("arguments", {}).get("prompts"), dict):
        options |= {"prompts": prompts["options"]}
    base_id = base_model.hub_id(file.config.get("base_model", {}))
    header = huggingface_hub.ModelCardData(
        library_name="randlora-pl",
        base_model=base_id,
        base_model_relation="adapter" if base_id else None,
        license=license,
        pipeline_tag=getattr(kind, "pipeline_tag", tag),
        tags=["randlora-pl", *method.lower().split(" + "), "peft", str(base.get("library"))],
    )
    trained, note = _config(file, config)
    own = {name: value for name, value in metadata.get("training", {}).items() if isinstance(value, int | float)}
    several = bool(metadata.get("several_labels"))
    call, measure = getattr(kind, "example", None), (kind or Objective).measure(several=several)
    labels = {
        f"test/{measure.name}": f"test {measure.called}",
        "test/loss": "test loss",
        f"zeroshot/{measure.name}": f"test {measure.called} before training",
        f"val/{measure.name}": f"validation {measure.called}",
        **_NAMES,
    }
    metrics = {label: _shown(key, results[key]) for key, label in labels.items() if results.get(key) is not None}
    card = huggingface_hub.ModelCard.from_template(
        header,
        template_str=resources.files(__package__).joinpath("card.md.jinja").read_text(encoding="utf-8"),
        name=repo.rpartition("/")[2],
        repo=repo,
        method=method,
        options=json.dumps(options) if options else "",
        model=base_words(base),
        weights=str(base.get("weights_sha256_sampled") or "")[:12],
        parameters=_numbers(file.tensors) + _numbers(file.extra, "prompts."),
        layers=len(file.layers),
        head=_numbers(file.extra, "decoupled." if kind is None or call or not kind.trained_head else ""),
        task=task,
        prompts=" ".join(restore.prompts_of(file).summary().split()).replace("|", "\\|"),
        images=ImageSpec.of_values(frame).summary() if frame else "",
        classnames=[" ".join(str(name).split()).replace("```", "") for name in names],
        kind="captions" if captions else "classes (any number for an image)" if several else "classes",
        dataset=config.get("data", {}).get("dataset"),
        metrics=metrics or {labels.get(key, key): _shown(key, value) for key, value in own.items()},
        call=call,
        config=trained,
        config_note=note,
        license=license,
    )
    return f"{card}\n"


def _numbers(tensors: Mapping[str, Tensor], start: str = "") -> int:
    """Return how many numbers tensors have whose names begin so."""
    return sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(start))


def remove_local_paths(value: Any) -> Any:
    """Return a config without local paths: absolute paths become ``PATH``, URLs lose their passwords."""
    if isinstance(value, Mapping):
        return {key: remove_local_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [remove_local_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if "://" in value:
        return re.sub(r"//[^/@\s]*@", "//", value)
    return "PATH" if re.match(r"[/~\\]|[A-Za-z]:[\\/]", value) or ".." in Path(value).parts else value


def _read(file: Path) -> dict[str, Any]:
    """Read a JSON or YAML file of a run; return {} if it does not exist."""
    try:
        return dict(parse_yaml(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(
            f"{file} is cut off or damaged ({type(error).__name__}). Move it away to push without it."
        ) from error


_SHOWN = ("rank", "alpha", "basis", "inner", "parts")
_NAMES = {
    "data/test": "test images", "data/train": "training images",
    "data/shots": "shots", "steps": "optimizer steps", "effective_batch": "images per step",
    "images_per_second": "images per second", "fit_seconds": "seconds of training", "peak_memory_bytes": "peak memory",
    "device": "device", "seed": "seed",
    "version": "randlora-pl", "version/torch": "PyTorch",
}  # fmt: skip


def _shown(key: str, value: Any) -> str:
    if key.endswith(("/acc", "/map")) or "recall" in key:
        return f"{100 * value:.2f} %"
    if key == "peak_memory_bytes":
        return byte_size(value)
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _config(file: AdapterFile, config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the training config as YAML and a note for the reader; empty if it is unknown."""
    if config:
        tree = {key: config[key] for key in ("seed_everything", "trainer", "model", "data") if key in config}
        settings = (tree.get("model") or {}).get("init_args") or {}
        if file.config.get("base_model", {}).get("sha256") and "pretrained" in settings:
            settings["pretrained"] = file_name(str(settings["pretrained"]))
        tree["trainer"] = {key: value for key, value in tree.get("trainer", {}).items() if value is not None}
        note = "Save this as `config.yaml`."
        if config.get("from_adapter"):
            note += " The training started where a LoRA had ended: add `--from-adapter LORA`."
    elif file.metadata.get("task"):
        arguments = without_local_paths(file.config)["metadata"]["arguments"]
        described = arguments | {"adapter": file.adapter.describe()}
        settings = {name: _as_class(value) for name, value in described.items()}
        seed = settings.pop("seed", 0)  # the command line has one seed for everything
        tree = {"seed_everything": seed, "model": {"class_path": file.metadata["task"], "init_args": settings}}
        note = "Save this as `config.yaml`, and set the dataset with `--data.dataset`."
    else:
        return "", ""
    return yaml.safe_dump(remove_local_paths(tree), sort_keys=False, allow_unicode=True), note


def _as_class(value: Any) -> Any:
    """Return the description of a method, or of several, in the form of a config; return any other value unchanged."""
    if isinstance(value, list):
        return [_as_class(each) for each in value]
    if not (isinstance(value, dict) and "method" in value):
        return value
    options = {name: _as_class(each) for name, each in value["options"].items()}
    return {"class_path": value["method"], "init_args": options}
