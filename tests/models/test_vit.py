from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.layers import resample_abs_pos_embed

from randlora_pl.models.vit import features_of, load_vit, meta_vit, vit_image_spec
from randlora_pl.models.weights import ImageSpec
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.weights_files import file_sha256

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DINOV2 = "vit_base_patch14_dinov2.lvd142m"


def same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_image_specs_come_from_the_models_own_configuration() -> None:
    assert vit_image_spec(DINOV2) == ImageSpec(224, *IMAGENET, "bicubic")  # timm's configuration says 518
    assert vit_image_spec(DINOV2, 518).size == 518
    half = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert vit_image_spec("vit_base_patch16_224.augreg_in21k") == ImageSpec(224, *half, crop_pct=0.9)
    assert vit_image_spec("vit_base_patch16_224.mae") == ImageSpec(224, *IMAGENET, crop_pct=0.9)  # by tag
    assert vit_image_spec("test_vit").size == 160
    assert vit_image_spec("dm_nfnet_f0.dm_in1k") == ImageSpec(192, *IMAGENET, resize="squash", crop_pct=0.9)


def test_preprocessing_is_timms_for_every_88th_name() -> None:
    modes = {"shortest": "center", "longest": "border", "squash": "squash"}
    for name in [*timm.list_models(pretrained=True)[::88], *timm.list_models("*nfnet*", pretrained=True)[:3]]:
        theirs = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        found = vit_image_spec(name)
        assert found.size == theirs["input_size"][-1] or "dinov2" in name
        assert modes[found.resize] == theirs["crop_mode"], name
        for key in ("mean", "std", "interpolation", "crop_pct"):
            assert getattr(found, key) == theirs[key], (name, key)


def test_oblong_images_are_refused_unless_a_size_is_typed() -> None:
    with pytest.raises(UserError, match=r"takes images of 1024 x 768 pixels.* Set --model.img_size 768"):
        vit_image_spec("vit_base_patch16_sapiens2")
    assert vit_image_spec("vit_base_patch16_sapiens2", 768).size == 768
    assert meta_vit("vit_base_patch16_sapiens2", 768) is not None
    with pytest.raises(UserError, match="positive, not 0"):
        vit_image_spec(DINOV2, 0)


def test_random_weights_are_a_pure_function_of_the_seed() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = load_vit("test_vit", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert same(first.model, load_vit("test_vit", "random", seed=1).model)
    assert not same(first.model, load_vit("test_vit", seed=2).model)
    facts = {"library": "timm", "name": "test_vit", "pretrained": "random", "image_size": 160, "seed": 1}
    assert first.identity.as_dict() == facts
    assert first.model(torch.zeros(2, 3, 160, 160)).shape == (2, first.num_features)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vgg11", "test_mambaout", "resnet18"])
def test_the_width_is_that_before_the_classifier(name: str) -> None:
    """Some heads of timm are wider than the last features (`head_hidden_size`)."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0).eval()
        assert model(torch.zeros(2, 3, 224, 224)).shape == (2, features_of(model))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_gives_its_weights_back_without_its_classifier(tmp_path: Path, suffix: str) -> None:
    source = timm.create_model("test_vit", num_classes=7)
    path = tmp_path / f"w.{suffix}"
    (torch.save if suffix == "pt" else save_file)(source.state_dict(), path)
    vit = load_vit("test_vit", str(path))
    source.reset_classifier(0)
    assert same(vit.model, source)
    assert vit.identity.sha256 == file_sha256(path)
    assert vit.identity.seed is None
    image = torch.randn(1, 3, 160, 160)
    assert torch.equal(vit.model.eval()(image), source.eval()(image))
    assert not any(isinstance(value, torch.Tensor) for value in flat(vars(vit.model)["pretrained_cfg"]))


def flat(value: Any) -> list[Any]:
    return [leaf for item in value.values() for leaf in flat(item)] if isinstance(value, dict) else [value]


def test_positions_of_another_image_size_are_resized(tmp_path: Path) -> None:
    """DINOv2's case, 518 to 224 pixels, on a smaller model with the same patches."""
    source = timm.create_model("vit_small_patch14_dinov2", num_classes=0, depth=1, img_size=518)
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("blocks.")}
    whole = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224).state_dict()
    path = tmp_path / "w.safetensors"
    save_file({**whole, **state, "mask_token": torch.zeros(1, 384)}, path)  # DINOv2's own files have one
    assert state["pos_embed"].shape == (1, 1 + 37 * 37, 384)
    vit = load_vit("vit_small_patch14_dinov2", str(path))
    assert vit.image.size == 224
    expected = resample_abs_pos_embed(state["pos_embed"], new_size=[16, 16], num_prefix_tokens=1)
    assert torch.equal(vit.model.state_dict()["pos_embed"], expected)
    assert torch.equal(vit.model.state_dict()["blocks.3.mlp.fc1.weight"], whole["blocks.3.mlp.fc1.weight"])


def test_files_of_other_architectures_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit2", num_classes=0).state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"norm.weight"):
        load_vit("test_vit", str(tmp_path / "w.pt"))
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    del state["norm.weight"]  # timm itself would load this without a word where the classifier differs
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"norm.weight"):
        load_vit("test_vit", str(tmp_path / "w.pt"))
    torch.save({"pos_embed": torch.zeros(1, 8, 64)}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="architecture"):
        load_vit("test_vit", str(tmp_path / "odd.pt"))
    with pytest.raises(UserError, match="exist"):
        load_vit("test_vit", str(tmp_path / "nothing.pt"))


def test_unknown_names_and_tags() -> None:
    for name, tag, words in (
        ("vit_base_patch14_dino2", None, "'vit_base_patch14_dinov2'"),
        ("vit_base_patch14_dinov2.lvd", None, r"'lvd142m'\?"),
        ("vit_base_patch14_dinov2", "lvd142", "'lvd142m'"),
        ("vit_base_patch16_224.dino", "mae", "--model.pretrained"),
        ("vit_large_patch14_224", "timm", "vit_large_patch14_224"),
    ):
        with pytest.raises(UserError, match=words):
            load_vit(name, tag)


@pytest.mark.parametrize("pretrained", ["timm", "r160_in1k"])
def test_tags_load_what_timm_has(monkeypatch: pytest.MonkeyPatch, pretrained: str) -> None:
    source = timm.create_model("test_vit")
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: source.state_dict())
    vit = load_vit("test_vit", pretrained)
    source.reset_classifier(0)
    assert same(vit.model, source)
    facts = {"library": "timm", "name": "test_vit.r160_in1k", "pretrained": "r160_in1k", "image_size": 160}
    assert vit.identity.as_dict() == facts


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    with pytest.raises(UserError) as info:
        load_vit("test_vit", "timm")
    assert "cannot be downloaded (ConnectionError: no route; no network?)" in str(info.value)
    assert "https://huggingface.co/timm/test_vit.r160_in1k" in str(info.value)


def test_sizes() -> None:
    vit = load_vit("resnet18", img_size=50)  # without patches any
    assert vit.image.size == 50
    assert vit.model(torch.zeros(1, 3, 50, 50)).shape == (1, 512)
    assert meta_vit("vit_so400m_patch14_siglip_gap_384") is not None  # 27 patches of 14 pixels, and a margin
    assert meta_vit("pvt_v2_b0", 64) is not None  # patches of 7 pixels that overlap
    for load, name, size, words in (
        (load_vit, "test_vit", 0, "test_vit"),
        (load_vit, "test_vit", 100, "100"),
        (meta_vit, "vit_so400m_patch14_siglip_gap_384", 385, "385 is not a multiple"),
        (meta_vit, DINOV2, 230, "230"),
        (load_vit, "levit_128s", 100, "100 x 100"),  # fails in use
    ):
        with pytest.raises(UserError, match=words):
            load(name, img_size=size)


def test_models_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ImportError("a package is missing")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(UserError, match="test_vit"):
        load_vit("test_vit")
