"""Folders of small adapters of the tiny CLIP, good and bad."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from randlora_pl.adapters import Adapter, LoRA, RandLoRA
from randlora_pl.tasks import ImageTask, LinearHeadTask, VisionLanguageTask

CLASSES = {"pets": ["cat", "dog"], "cars": ["red", "blue", "old"], "birds": ["owl", "tit", "hen", "jay"]}
MEANS = {"pets": (0.4, 0.5, 0.6), "cars": (0.5, 0.5, 0.5), "birds": (0.1, 0.2, 0.3)}
METHODS: dict[str, Adapter] = {"pets": RandLoRA(rank=6), "cars": LoRA(rank=2), "birds": RandLoRA(rank=6, seed=3)}


def write(path: Path, name: str, seed: int = 0, kind: type[ImageTask] = VisionLanguageTask, **options: Any) -> Path:
    """An adapter with the classes, the images and the method of a name, and an update that counts."""
    task = kind("tiny", adapter=options.pop("adapter", METHODS[name]), **options)
    task.set_classes(CLASSES[name], ["a picture of a {}"])
    task.adapt()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    frame: dict[str, Any] = {"size": 32, "mean": MEANS[name], "std": (0.5, 0.4, 0.5), "interpolation": "bilinear"}
    return task.save(path, {"frame": frame | {"resize": "squash", "crop_pct": 1.0, "fill": (0, 0, 0)}})


def damage(path: Path) -> None:
    """Change a bit of a tensor."""
    file = path / "adapter.safetensors" if path.is_dir() else path
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def changed(source: Path, target: Path, **values: Any) -> None:
    """Copy an adapter with other values in its config, whose checksums are removed."""
    shutil.copytree(source, target)
    config = json.loads((target / "adapter_config.json").read_text())
    del config["sha256"]
    (target / "adapter_config.json").write_text(json.dumps(config | values))


def fill(folder: Path) -> Path:
    """Good adapters of one base model, a default beside the folder, and adapters of each kind that is refused."""
    for name in CLASSES:
        write(folder / ("birds.safetensors" if name == "birds" else name), name)
    shutil.copytree(folder / "pets", folder.parent / "outside")
    (folder / "link").symlink_to(folder.parent / "outside")
    (folder / "inner").mkdir()
    for file in (folder / "pets").iterdir():
        (folder / "inner" / file.name).symlink_to(file)
    shutil.copytree(folder / "pets", folder / "damaged")
    damage(folder / "damaged")
    write(folder / "tower", "cars", kind=LinearHeadTask)
    config = json.loads((folder / "pets" / "adapter_config.json").read_text())
    changed(folder / "pets", folder / "other", base_model=config["base_model"] | {"name": "ViT-B-32"})
    metadata = config["metadata"]
    changed(folder / "pets", folder / "texts", metadata=metadata | {"task": "CausalLMTask", "classnames": []})
    changed(folder / "pets", folder / "plain", metadata={})
    (folder / "empty").mkdir()
    return folder


REFUSED = {
    "damaged": (422, "damaged or was changed"),
    "tower": (422, "another part or size"),
    "other": (422, "another base model, open_clip ViT-B-32"),
    "texts": (422, "not texts like"),
    "plain": (422, "has no classes"),
    "empty": (404, "the server has no adapter 'empty'"),
    "link": (404, "no adapter"),
    "inner": (404, "no adapter"),
    "none": (404, "no adapter"),
}
"""Status and a part of the answer for each name that is refused."""

BAD_NAMES = [
    "../outside",
    "..",
    ".",
    ".hidden",
    "/etc/passwd",
    "pets/../cars",
    "pets\\..",
    "a\0b",
    "a\nb",
    "x" * 5000,
    "pets/",
]
