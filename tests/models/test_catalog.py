import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import yaml
from timm.models import get_pretrained_cfg

from randlora_pl.models.catalog import MODELS, ModelRow, library_of
from randlora_pl.models.clip import clip_image_spec, meta_clip
from randlora_pl.models.vit import meta_vit, vit_image_spec
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec
from tests.support.products import in_one_item


@in_one_item("row", MODELS)
def test_rows_say_what_the_libraries_say(row: ModelRow) -> None:
    model = meta_clip(row.name) if row.library == "open_clip" else meta_vit(row.name)
    assert sum(parameter.numel() for parameter in model.parameters()) == row.parameters
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}  # counting needs no memory
    if row.library == "open_clip":
        assert clip_image_spec(row.name).size == row.image_size
        if row.name != "tiny":
            assert set(row.tags) <= set(open_clip.list_pretrained_tags_by_model(row.name))
    else:
        assert vit_image_spec(row.name).size == row.image_size
        assert {f"{row.name}.{tag}" for tag in row.tags} <= set(timm.list_models(f"{row.name}.*", pretrained=True))
        assert {get_pretrained_cfg(f"{row.name}.{tag}").license for tag in row.tags} == {row.license.lower()}


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("tiny", "open_clip"),
        ("ViT-B/32", "open_clip"),
        ("vit_base_patch14_dinov2.lvd142m", "timm"),
        ("resnet18", "timm"),
    ],
)
def test_names_find_their_library(name: str, library: str) -> None:
    assert library_of(name) == library
    with pytest.raises(UserError, match="'vit_base_patch14_dinov2'"):
        library_of("vit_base_patch14_dino_v2.lvd142m")


def test_the_catalog_imports_nothing_heavy() -> None:
    code = (
        "import sys, randlora_pl.models.catalog; "
        "print([name for name in ('torch', 'timm', 'open_clip', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Which shipped configs and models are not prepared as in the paper; docs/preprocessing.md lists them


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "preprocessing.md").read_text()


def usual(spec: ImageSpec) -> bool:
    return (spec.resize, spec.crop_pct) == ("shortest", 1)


def test_bundled_configs_of_the_papers_models_are_prepared_as_in_the_paper() -> None:
    seen = 0
    for name in ("clip_*", "dinov2_*", "quickstart", "tiny_clip"):
        for file in sorted((ROOT / "configs").glob(f"{name}.yaml")):
            model = yaml.safe_load(file.read_text())["model"]
            model = model.get("init_args", model)
            clip = library_of(model["name"]) == "open_clip"
            spec = clip_image_spec(model["name"], model.get("pretrained")) if clip else vit_image_spec(model["name"])
            assert usual(spec), file
            seen += 1
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
