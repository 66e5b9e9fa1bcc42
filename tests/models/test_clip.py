import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from randlora_pl.models.clip import ImageTower, LoadedClip, load_clip, load_tokenizer
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
