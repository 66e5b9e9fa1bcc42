import subprocess
import sys

import open_clip
import timm
from timm.models import get_pretrained_cfg

from randlora_pl.models.catalog import MODELS, ModelRow
from randlora_pl.models.clip import clip_image_spec, meta_clip
from randlora_pl.models.vit import meta_vit, vit_image_spec
from tests.support.products import in_one_item


@in_one_item("row", MODELS)
def test_rows_say_what_the_libraries_say(row: ModelRow) -> None:
    model = meta_clip(row.name) if row.library == "open_clip" else meta_vit(row.name)
    assert sum(parameter.numel() for parameter in model.parameters()) == row.parameters
    if row.library == "open_clip":
        assert clip_image_spec(row.name).size == row.image_size
        if row.name != "tiny":
            assert set(row.tags) <= set(open_clip.list_pretrained_tags_by_model(row.name))
    else:
        assert vit_image_spec(row.name).size == row.image_size
        assert {f"{row.name}.{tag}" for tag in row.tags} <= set(timm.list_models(f"{row.name}.*", pretrained=True))
        assert {get_pretrained_cfg(f"{row.name}.{tag}").license for tag in row.tags} == {row.license.lower()}


def test_names_are_unique() -> None:
    assert len({row.name for row in MODELS}) == len(MODELS)


def test_the_catalog_imports_nothing_heavy() -> None:
    code = (
        "import sys, randlora_pl.models.catalog; "
        "print([name for name in ('torch', 'timm', 'open_clip', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
