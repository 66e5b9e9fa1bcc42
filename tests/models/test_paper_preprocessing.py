"""Which shipped configs and models are not prepared as in the paper; docs/preprocessing.md lists them."""

from pathlib import Path

import yaml

from randlora_pl.models import clip_image_spec, vit_image_spec
from randlora_pl.models.catalog import MODELS
from randlora_pl.utils.image_spec import ImageSpec

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "preprocessing.md").read_text()


def usual(spec: ImageSpec) -> bool:
    return (spec.resize, spec.crop_pct) == ("shortest", 1)


def test_bundled_configs_of_images_are_prepared_as_in_the_paper() -> None:
    seen = 0
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        config = yaml.safe_load(file.read_text())
        model = config["model"].get("init_args", config["model"])
        if "/" in model["name"]:  # of texts
            continue
        seen += 1
        clip = "dinov2" not in model["name"]
        spec = clip_image_spec(model["name"], model.get("pretrained")) if clip else vit_image_spec(model["name"])
        assert usual(spec), file
    assert seen == 9


def test_the_paper_writes_its_preprocessing() -> None:
    for name in ("paper", "official"):
        recipe = yaml.safe_load((ROOT / "configs" / "recipes" / f"{name}.yaml").read_text())
        assert recipe["data"]["resize"] == "shortest"
    images = 0
    for file in sorted((ROOT / "configs" / "sweeps").glob("*.yaml")):
        sweep = yaml.safe_load(file.read_text())
        of_images = any("clip" in str(each) or "dinov2" in str(each) for each in sweep["models"].values())
        if "paper" in sweep and of_images:
            images += 1
            assert sweep["set"]["data.resize"] == "shortest", file
    assert images == 15


def test_other_models_of_the_catalog_are_listed() -> None:
    line = next(block for block in PAGE.split("\n\n") if block.startswith("Most models in the catalog"))
    for row in MODELS:
        for tag in row.tags:
            clip = row.library == "open_clip"
            spec = clip_image_spec(row.name, tag) if clip else vit_image_spec(f"{row.name}.{tag}")
            assert usual(spec) == (f"`{row.name}`" not in line) or (clip and f"`{tag}`" not in line), (row.name, tag)
