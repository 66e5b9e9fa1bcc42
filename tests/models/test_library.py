import pytest

from randlora_pl.models.catalog import library_of
from randlora_pl.utils.errors import UserError


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("tiny", "open_clip"),
        ("ViT-B-32", "open_clip"),
        ("ViT-B/32", "open_clip"),
        ("vit_base_patch14_dinov2.lvd142m", "timm"),
        ("resnet18", "timm"),
    ],
)
def test_names_find_their_library(name: str, library: str) -> None:
    assert library_of(name) == library


def test_names_of_neither() -> None:
    with pytest.raises(UserError, match="'vit_base_patch14_dinov2'"):
        library_of("vit_base_patch14_dino_v2.lvd142m")
