"""Facts about image data: for ``results.json`` and for the start summary."""

from dataclasses import asdict
from typing import Any

from randlora_pl.data.images.frame import Frame


def image_facts(data: Any) -> dict[str, Any]:
    """Return flat, JSON-ready facts about an `ImageData` and its run; splits that were not read are omitted."""
    splits = data.splits
    facts: dict[str, Any] = {"dataset": data.row.name, "classes": data.num_classes, "seed": data.seed}
    facts |= {"split": splits.split} if splits.split != "default" else {}
    facts |= {"class_half": splits.half} if splits.half != "all" else {}
    facts |= {split: len(held) for split, held in splits.held.items()}
    facts |= {"shots": splits.shots, "fraction": data.fraction, "train_split": data.train_split}
    if data.plan is not None:
        facts |= data.run_facts()
        facts |= {name: value for name, value in asdict(data.augment).items() if value is not None}
    return facts | {"skipped": len(data.skipped)}


def image_lines(data: Any, facts: dict[str, Any]) -> dict[str, str]:
    """Return the start summary's lines about an `ImageData`."""
    parts = ", ".join(f"{facts[split]:,} {split}" for split in ("train", "val", "test") if split in facts)
    shots = f", {facts['shots']} shots" if facts.get("shots") else ""
    half = f"{facts['class_half']} " if "class_half" in facts else ""
    name = facts["dataset"] + (f" ({facts['split']} split)" if "split" in facts else "")
    about = f"{name}: {facts['classes']} {half}classes, {parts} images{shots}{data.notes}"
    more = ", ".join(data.augment.enabled())
    own = "" if data.spec is None or data.frame == Frame.of(data.spec) else " (not the model's own preprocessing)"
    usual = data.frame.resize == "shortest" and data.frame.crop_pct == 1
    images = {} if usual and not own else {"images": f"{data.frame.steps()}{own}"}
    return {"data": about} | images | ({"augmentation": more} if more else {})
