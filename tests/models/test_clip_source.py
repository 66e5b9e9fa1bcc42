import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from randlora_pl.models.clip import download, image_size, image_spec, resolve
from randlora_pl.models.weights import ImageSpec, open_clip_spec
from randlora_pl.utils.errors import UserError

OPENAI = open_clip.OPENAI_DATASET_MEAN


def test_unknown_names_and_tags_get_a_near_match() -> None:
    for name, tag, words in (
        ("ViT-B32", None, "'ViT-B-32'"),
        ("tyny", None, "'tiny'"),
        ("ViT-H-14", "laion2b_s32b_b79", "Did you mean 'laion2b_s32b_b79k'"),
        ("ViT-H-14", "laion2b_s32b_b79", "Its tags: laion2b_s32b_b79k, metaclip_fullcc"),
        ("Small", "openai", "Its tags: none"),
    ):
        with pytest.raises(UserError, match=words):
            resolve(name, tag)


def test_weights_get_the_activation_of_their_training() -> None:
    for name in ("ViT-B-32", "ViT-B/32"):
        source = resolve(name, "openai")
        assert source.name == "ViT-B-32-quickgelu" and source.config["quick_gelu"]
        assert "trained with QuickGELU, so ViT-B-32-quickgelu is used" in source.notes[0]
    source = resolve("ViT-B-32-quickgelu", "laion2b_s34b_b79k")
    assert source.name == "ViT-B-32" and not source.config.get("quick_gelu")
    assert "trained with plain GELU" in source.notes[0]


@pytest.mark.parametrize(
    ("name", "tag"), [("ViT-B-32-quickgelu", "OpenAI"), ("ViT-L-14", "laion2b-s32b-b82k"), ("ViT-H-14", "random")]
)
def test_names_that_fit_stay(name: str, tag: str) -> None:
    source = resolve(name, tag)
    assert source.name == name
    assert source.pretrained == tag.lower().replace("-", "_")
    assert source.notes == ()


def test_every_tag_of_every_quickgelu_pair_gets_its_activation() -> None:
    names = set(open_clip.list_models())
    pairs = [(name, tag) for name, tag in open_clip.list_pretrained() if name + "-quickgelu" in names]
    assert len(pairs) > 60
    for name, tag in pairs:
        trained_with = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
        for typed in (name, name + "-quickgelu"):
            assert bool(resolve(typed, tag).config.get("quick_gelu", False)) == trained_with, (typed, tag)


def test_files_keep_the_name_and_say_what_is_assumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = resolve("ViT-L-14", "w.pt")
    assert (source.kind, source.name, source.pretrained) == ("file", "ViT-L-14", str(tmp_path / "w.pt"))
    assert "used with plain GELU; weights trained otherwise need --model.name ViT-L-14-quickgelu" in source.notes[0]
    assert "differ in image preprocessing" in source.notes[1]  # laion2b_s32b_b82k has its own
    assert (
        "used with QuickGELU; weights trained otherwise need --model.name ViT-B-16."
        in (resolve("ViT-B-16-quickgelu", "w.pt").notes[0])
    )
    assert resolve("Small-wide", "w.pt").notes == ()


def test_image_specs_are_those_of_the_tag_or_of_all_tags_that_agree(tags: None) -> None:
    assert image_spec(resolve("Small", "plain_tag")) == ImageSpec(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    assert image_spec(resolve("ViT-L-14", "laion2b_s32b_b82k")).mean == (0.5, 0.5, 0.5)
    assert image_spec(resolve("ViT-L-14-336", "openai")) == ImageSpec(
        336, OPENAI, open_clip.OPENAI_DATASET_STD, "bicubic"
    )
    assert image_spec(resolve("Small", "random")).mean == (0.1, 0.2, 0.3)
    assert image_spec(resolve("Small-wide", "random")).mean == OPENAI
    assert image_spec(resolve("Small-custom", "random")).mean == OPENAI
    assert image_spec(resolve("ViT-B-16-SigLIP", None)).mean == (0.5, 0.5, 0.5)


def test_every_tag_is_prepared_as_open_clip_does() -> None:
    """SigLIP, SigLIP2, PE-Core, DFN5B and CLIPA squash, others crop."""
    squashed = 0
    for name, tag in open_clip.list_pretrained():
        found = image_spec(resolve(name, tag))
        theirs = PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), open_clip.get_pretrained_cfg(name, tag)))
        for key in ("mean", "std", "interpolation"):
            assert getattr(found, key) == getattr(theirs, key), (name, tag, key)
        assert (found.resize, found.crop_pct, found.fill) == (theirs.resize_mode, 1, (0, 0, 0)), (name, tag)
        squashed += found.resize == "squash"
    assert squashed >= 48


def test_preprocessing_of_a_configuration_that_somebody_wrote() -> None:
    def of(**values: Any) -> ImageSpec:
        return open_clip_spec(values, 32, "local-dir:it")

    assert of() == of(mean=None, unknown=3) == ImageSpec(32)
    assert of(mean=0.5, std=[0.1, 0.2, 0.3], interpolation="random") == ImageSpec(32, (0.5,) * 3, (0.1, 0.2, 0.3))
    assert of(resize_mode="longest", fill_color=114).fill == (114, 114, 114)
    for values, words in [
        ({"resize_mode": "squish"}, "'squish'. Did you mean 'squash'"),
        ({"resize_mode": ["squash"]}, "Known: shortest, longest, squash"),
        ({"interpolation": "lanczos"}, "Known: bicubic, bilinear"),
        ({"mean": [0.5, 0.5]}, "three numbers"),
        ({"mean": "gray"}, "three numbers"),
        ({"mean": [0.5, math.nan, 0.5]}, "three numbers"),
        ({"std": [0.5, 0, 0.5]}, "three numbers from 1e-6"),
        ({"resize_mode": "longest", "fill_color": 256}, "from 0 to 255"),
        ({"mode": "L"}, "Only RGB"),
    ]:
        with pytest.raises(UserError, match="its preprocessing of images") as info:
            of(**values)
        assert words in str(info.value) and str(info.value).count("\n") < 2
    for size in (0, 2.5, True):
        with pytest.raises(UserError, match="whole number"):
            open_clip_spec({}, size, "it")


def test_other_image_sizes() -> None:
    assert image_spec(resolve("Small", None), 48).size == 48
    assert image_spec(resolve("Small-resnet", None), 50).size == 50  # no patches to divide it
    with pytest.raises(UserError, match="45"):
        image_spec(resolve("Small", None), 45)
    with pytest.raises(UserError, match="16"):
        image_spec(resolve("Small", None), 4)
    for size in (0, -8):
        with pytest.raises(UserError, match=f"Small: the image size must be positive, not {size}"):
            image_spec(resolve("Small", None), size)
    with pytest.raises(UserError, match="square"):
        image_size(resolve("Small-oblong", None))


def test_the_tiny_model() -> None:
    shipped = resolve("tiny", None)
    assert (shipped.kind, shipped.pretrained) == ("shipped", "emoji-fashion")
    assert image_spec(shipped).size == 32
    assert resolve("tiny", "random").kind == "random"
    assert resolve("tiny", "a/w.pt").kind == "file"
    with pytest.raises(UserError, match="'emoji-fashion'"):
        resolve("tiny", "emoji")
    with pytest.raises(UserError, match="32"):
        image_spec(shipped, 64)


def test_downloads_use_the_tags_file_or_say_where_it_is(
    tags: None, small_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert download(resolve("Small", "plain_tag")) == str(small_file)
    with pytest.raises(UserError) as info:
        download(resolve("Small", "far_tag"))
    message = str(info.value)
    assert "downloaded" in message and "--model.name" in message and "\n" not in message
    entry = open_clip.get_pretrained_cfg("Small", "far_tag")
    monkeypatch.setitem(entry, "hf_hub", "")
    monkeypatch.setitem(entry, "url", "file:///no/such/file.pt")
    with pytest.raises(UserError, match=r"file:///no/such/file.pt"):
        download(resolve("Small", "far_tag"))
