import logging
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from safetensors.torch import save_file
from torch import Tensor

from randlora_pl.models.clip import (
    ImageTower,
    LoadedClip,
    download,
    image_size,
    image_spec,
    load_clip,
    load_tokenizer,
    resolve,
)
from randlora_pl.models.weights import ImageSpec, open_clip_spec
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.weights_files import file_sha256
from tests.support.products import covering


def same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def embed(clip: LoadedClip) -> tuple[Tensor, Tensor]:
    images = torch.randn(2, 3, clip.image.size, clip.image.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model: Any = clip.model
        return model.encode_image(images), model.encode_text(clip.tokenizer(["a cat", "two dogs", "a tree"]))


@pytest.mark.parametrize("name", ["Small", "Small-quickgelu", "Small-custom", "Small-timm", "Small-resnet", "tiny"])
def test_every_kind_of_model_is_reached_in_one_way(name: str) -> None:
    clip = load_clip(name, "random")
    images, texts = embed(clip)
    assert images.shape == (2, clip.embed_dim)
    assert texts.shape == (3, clip.embed_dim)
    assert clip.model.logit_scale.numel() == 1
    assert {parameter.dtype for parameter in clip.model.parameters()} == {torch.float32}
    tower = ImageTower(clip.model)
    names = {key for key in clip.model.state_dict() if key.startswith("visual.")}
    assert set(tower.state_dict()) == names
    size = clip.image.size
    image = torch.randn(2, 3, size, size)
    torch.testing.assert_close(tower.eval()(image), clip.model.eval().encode_image(image))


@pytest.mark.parametrize("name", ["Small", "tiny"])
def test_random_weights_are_a_pure_function_of_the_seed(name: str) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = load_clip(name, "random", seed=1)
    assert torch.equal(torch.get_rng_state(), state) and first.identity.seed == 1
    torch.manual_seed(7)
    assert same(first.model, load_clip(name, "random", seed=1).model)
    assert not same(first.model, load_clip(name, "random", seed=2).model)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_gives_its_weights_back(tmp_path: Path, suffix: str) -> None:
    model = load_clip("Small", seed=4).model
    path = tmp_path / f"w.{suffix}"
    (torch.save if suffix == "pt" else save_file)(model.state_dict(), path)
    clip = load_clip("Small", str(path), seed=5)
    assert same(clip.model, model)
    facts = {"library": "open_clip", "name": "Small", "pretrained": path.name, "image_size": 32}
    assert clip.identity.as_dict() == facts | {"sha256": file_sha256(path)}


def test_leftovers_of_older_files_do_no_harm_and_half_precision_becomes_fp32(tmp_path: Path) -> None:
    model = load_clip("Small").model
    old = {"logit_scale": model.logit_scale.detach().reshape(1)}
    old["text.transformer.embeddings.position_ids"] = torch.arange(12)
    torch.save(model.state_dict() | old, tmp_path / "old.pt")
    assert same(load_clip("Small", str(tmp_path / "old.pt"), seed=1).model, model)
    state = {name: value.half() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "half.safetensors")
    model = load_clip("Small", str(tmp_path / "half.safetensors")).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.state_dict()["ln_final.weight"], state["ln_final.weight"].float())


@pytest.mark.parametrize(("name", "size"), covering(["Small", "Small-custom"], [32, 48], strength=1))
def test_loading_equals_open_clips_own(small_file: Path, name: str, size: int) -> None:
    """Also a plain layout into a custom-text model, a scalar logit scale into a vector, and resized positions."""
    mine = load_clip(name, str(small_file), force_image_size=size)
    theirs = open_clip.create_model(name, pretrained=str(small_file), force_image_size=size)
    assert same(mine.model, theirs)
    assert mine.image.size == size
    assert embed(mine)[0].shape == (2, 24)


def test_a_timm_tower_is_resized_after_loading(tmp_path: Path) -> None:
    base = load_clip("Small-timm")
    torch.save(base.model.state_dict(), tmp_path / "w.pt")
    clip = load_clip("Small-timm", str(tmp_path / "w.pt"), force_image_size=96)
    assert clip.model.visual.trunk.pos_embed.shape[1] == 1 + 6 * 6
    assert torch.equal(clip.model.visual.trunk.cls_token, base.model.visual.trunk.cls_token)
    assert embed(clip)[0].shape == (2, 24)
    with pytest.raises(UserError, match="Small-timm"):
        load_clip("Small-timm", force_image_size=100)


def test_files_of_other_architectures_are_refused(small_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"visual.class_embedding"):
        load_clip("Small-wide", str(small_file))
    with pytest.raises(UserError, match=r"visual.trunk.cls_token"):
        load_clip("Small-timm", str(small_file))
    odd = {"visual.positional_embedding": torch.zeros(1 + 6, 32)}  # six patches form no square
    torch.save(odd, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="architecture"):
        load_clip("Small", str(tmp_path / "odd.pt"))
    with pytest.raises(UserError, match="exist"):
        load_clip("Small", str(tmp_path / "nothing.pt"))


def test_tags_load_with_the_activation_of_their_weights(
    tags: None, small_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "randlora_pl"):
        quick = load_clip("Small", "quick_tag")
    assert [record.message for record in caplog.records] == [
        "Small: the weights 'quick_tag' were trained with QuickGELU, so Small-quickgelu is used."
    ]
    facts = {"library": "open_clip", "name": "Small-quickgelu", "pretrained": "quick_tag", "image_size": 32}
    assert quick.identity.as_dict() == facts
    assert type(quick.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    oracle = open_clip.create_model("Small-quickgelu", pretrained=str(small_file))
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(quick.model.encode_image(image), oracle.encode_image(image))
    plain = load_clip("Small-quickgelu", "plain_tag")
    assert plain.identity.name == "Small"
    assert type(plain.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "GELU"
    assert (plain.model.encode_image(image) - quick.model.encode_image(image)).abs().max() > 1e-4


def test_towers_say_what_they_need_and_leave_out_their_own_tokens() -> None:
    with pytest.raises(UserError, match="'no-such-owner/text'"):
        load_clip("Small-hf-text")
    clip = load_clip("Small-hf-tokens")  # works without its tokenizer
    assert ImageTower(clip.model)(torch.zeros(1, 3, 32, 32)).shape == (1, 24)
    with pytest.raises(UserError, match="'no-such-owner/tokens'"):
        _ = clip.tokenizer
    clip = load_clip("Small-coca")
    image = torch.randn(2, 3, 32, 32)
    assert isinstance(clip.model.visual(image), tuple)
    assert ImageTower(clip.model)(image).shape == (2, 24)


def test_tokenizers_follow_the_configuration() -> None:
    assert load_tokenizer("Small")(["a", "b"]).shape == (2, 12)
    assert load_tokenizer("ViT-B-32")(["a"]).shape == (1, 77)
    assert load_tokenizer("tiny")(["a"]).shape == (1, 16)


# Where the weights of a name come from


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
