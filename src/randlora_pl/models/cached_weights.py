"""Weights in the cache of the model hub, found without importing a model library that is not needed."""

from pathlib import Path

from randlora_pl.utils.files.documents import parse_json


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
