"""Models in a folder and at the Hub, under the names of open_clip and timm."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from randlora_pl.models import clip_image_spec, library_of, load_clip, load_tokenizer, load_vit, meta_clip, meta_vit
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.reuse import caching
from tests.fake_hub import FakeHub, Repo, fake_hub
from tests.models.conftest import SMALL
from tests.models.folders.make import FRAME, TIMM, clip_folder, vit_folder
from tests.support.products import in_one_item


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("folders") / "clip")


@pytest.fixture(scope="module")
def vits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_folder(tmp_path_factory.mktemp("folders") / "vit-dinov2")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clips: Path, vits: Path) -> Iterator[FakeHub]:
    """The two folders as repositories."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with fake_hub(monkeypatch) as server:
        for name, folder in (("ann/clip", clips), ("ann/vit", vits)):
            files = {file.name: file.read_bytes() for file in folder.iterdir()}
            server.repos[name] = Repo(False, {"main": files, "v1": files})
        yield server


def test_a_folder_of_open_clip_gives_its_model_its_preprocessing_and_its_tokenizer(clips: Path) -> None:
    name = f"local-dir:{clips}"
    theirs = open_clip.create_model(name).eval()
    clip = load_clip(name)
    images, words = torch.randn(2, 3, 32, 32), ["cat dog", "dog"]
    tokens = clip.tokenizer(words)
    assert torch.equal(tokens, open_clip.get_tokenizer(name)(words)) and tokens[0, :2].tolist() == [2, 3]
    with torch.no_grad():
        for ours, expected in zip(clip.model.eval()(images, tokens), theirs(images, tokens), strict=True):
            assert torch.equal(ours, expected)
    assert (clip.image.mean, clip.image.std, clip.image.interpolation) == (
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 0.6),
        "bilinear",
    )
    assert clip_image_spec(name) == clip.image
    identity = clip.identity
    assert (identity.name, identity.pretrained) == ("local-dir:clip", "open_clip_model.safetensors")
    assert identity.sha256 and identity.config_sha256
    random = load_clip(name, "random").identity
    assert (random.pretrained, random.sha256, random.config_sha256) == ("random", None, identity.config_sha256)
    assert library_of(name) == "open_clip" and sum(p.numel() for p in meta_clip(name).parameters()) > 0


def test_other_weights_of_a_folder_are_loaded_again(clips: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clips, tmp_path / "clip")
    with caching():
        state = load_clip(f"local-dir:{folder}").model.state_dict()
        save_file({name: value + 1 for name, value in state.items()}, folder / "open_clip_model.safetensors")
        assert load_clip(f"local-dir:{folder}").model.logit_scale == state["logit_scale"] + 1


def test_a_folder_of_timm_gives_its_model_at_its_size(vits: Path) -> None:
    name = f"local-dir:{vits}"
    theirs = timm.create_model(name, pretrained=True, num_classes=0).eval()
    vit = load_vit(name)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(vit.model.eval()(images), theirs(images))
    assert (vit.image.size, vit.image.mean) == (96, (0.1, 0.2, 0.3))  # not DINOv2's 224: the folder decides
    assert (vit.identity.name, vit.identity.pretrained) == ("local-dir:vit-dinov2", "model.safetensors")
    assert library_of(name) == "timm" and meta_vit(name, 48) is not None
    assert load_vit(name, img_size=48).identity.image_size == 48
    assert load_vit(name, "random", seed=1).identity.seed == 1


def test_repositories_of_the_hub_are_the_same_models(hub: FakeHub, clips: Path, vits: Path) -> None:
    clip, vit = load_clip("hf-hub:ann/clip"), load_vit("hf_hub:ann/vit@v1")
    local, state = load_clip(f"local-dir:{clips}"), vit.model.state_dict()
    folder = load_vit(f"local-dir:{vits}").model.state_dict()
    assert all(torch.equal(value, clip.model.state_dict()[key]) for key, value in local.model.state_dict().items())
    assert clip.identity.sha256 == local.identity.sha256 and clip.identity.name == "hf-hub:ann/clip"
    assert clip.image == local.image and vit.identity.name == "hf-hub:ann/vit@v1"
    assert all(torch.equal(value, state[key]) for key, value in folder.items())
    hub.requests.clear()
    load_vit("hf-hub:ann/vit", img_size=48)
    load_clip("hf-hub:ann/clip")
    files = ("vit/resolve/main/config.json", "clip/resolve/main/open_clip_config.json")
    assert hub.requests == [f"HEAD /ann/{file}" for file in files]  # all else is of the same commit, in the cache
    hub.shutdown()
    hub.server_close()  # from now on from the cache
    assert load_clip("hf-hub:ann/clip").identity == clip.identity


@pytest.mark.slow
def test_repositories_name_their_tokenizer_and_open_clip_takes_no_revision(hub: FakeHub, clips: Path) -> None:
    config = json.loads((clips / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "ann/clip"
    hub.repos["ann/clip"].branches["main"]["open_clip_config.json"] = json.dumps(config).encode()
    assert load_tokenizer("hf-hub:ann/clip")(["dog"])[0, 0] == 3
    with pytest.raises(UserError, match="revision"):
        load_clip("hf-hub:ann/clip@v1")


@in_one_item(
    ("name", "message"),
    [
        ("hf-hub:ann/none", "has no model ann/none"),
        ("hf-hub:ann/vit@v9", "no revision 'v9'"),
        ("hf-hub:ann/empty", "no open_clip_config.json of open_clip or config.json of timm"),
        ("hf-hub:a b", "not a repository"),
        ("hf-hub:", "is followed by nothing"),
        ("local-dir:/no/such", "not a folder"),
    ],
)
def test_unknown_names_are_one_line(hub: FakeHub, name: str, message: str) -> None:
    hub.repos["ann/empty"] = Repo(False)
    with pytest.raises(UserError, match=message) as found:
        library_of(name)
    assert "\n" not in str(found.value)


def test_a_hub_that_does_not_answer_is_one_try(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: FakeHub) -> None:
    from huggingface_hub.utils import _http

    waited: list[float] = []
    monkeypatch.setattr(_http.time, "sleep", waited.append)
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UserError, match="cannot be reached") as found:
        library_of("hf-hub:ann/clip")
    assert not waited and "\n" not in str(found.value)


def _changed(folder: Path, **parts: Any) -> None:
    file = folder / "open_clip_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))


def test_half_a_folder_and_a_damaged_one_are_one_line(clips: Path, vits: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(clips, half)
    name = f"local-dir:{half}"
    (half / "open_clip_model.safetensors").unlink()
    assert load_clip(name, "random").identity.pretrained == "random"
    with pytest.raises(UserError, match="no weights"):
        load_clip(name)
    with pytest.raises(UserError, match="no weights 'openai'"):
        load_clip(name, "openai")
    (half / "open_clip_model.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(UserError, match="safetensors"):
        load_clip(name)
    (half / "open_clip_model.safetensors").unlink()
    torch.save({"weight": Path("x")}, half / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="could run code"):
        load_clip(name)
    for text in ("{", "[]", "{}", '{"model_cfg": {"embed_dim": 3, "vision_cfg": 1, "text_cfg": {}}}'):
        (half / "open_clip_config.json").write_text(text)
        with pytest.raises(UserError, match="open_clip_config") as found:
            load_clip(name)
        assert "\n" not in str(found.value)
    shutil.copy(clips / "open_clip_config.json", half)
    _changed(half, preprocess_cfg={"interpolation": 3})
    with pytest.raises(UserError, match="interpolation 3") as found:
        load_clip(name, "random")
    assert "\n" not in str(found.value)
    for part, values, message in (
        ("vision_cfg", {"image_size": "x"}, "vision_cfg.image_size is 'x'"),
        ("vision_cfg", {"image_size": []}, r"vision_cfg.image_size is \[\]"),
        ("vision_cfg", {"patch_size": 0}, "vision_cfg.patch_size is 0"),
        ("vision_cfg", {"patch_size": "a"}, "vision_cfg.patch_size is 'a'"),
        ("vision_cfg", {"layers": 10**6}, "vision_cfg.layers is 1000000"),
        ("text_cfg", {"layers": 10**6}, "text_cfg.layers is 1000000"),
        ("text_cfg", {"tokenizer_kwargs": None}, "text_cfg.tokenizer_kwargs is None"),
    ):
        _changed(half, model_cfg=SMALL | {part: SMALL[part] | values}, preprocess_cfg=FRAME)
        with pytest.raises(UserError, match=message):
            load_clip(name, "random")
    (half / "open_clip_config.json").unlink()
    with pytest.raises(UserError, match="no open_clip_config"):
        load_clip(name)
    other = tmp_path / "other"
    shutil.copytree(vits, other)
    for change, message in (
        ({"architecture": "test_vitt"}, "Did you mean 'test_vit'"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path"),
        ({"model_args": {"in_chans": 1}}, "channels"),
        ({"model_args": {"no_such": 1}}, "no_such"),
        ({"model_args": {"depth": 10**6}}, "model_args.depth is 1000000"),
        ({"architecture": None}, "architecture"),
        ({"pretrained_cfg": TIMM["pretrained_cfg"] | {"crop_mode": "fold"}}, "resize 'fold'"),
        ({"pretrained_cfg": TIMM["pretrained_cfg"] | {"std": [0.5]}}, "three numbers"),
        ({"pretrained_cfg": TIMM["pretrained_cfg"] | {"input_size": [3, 0, 0]}, "model_args": {}}, "positive, not 0"),
        ({"pretrained_cfg": TIMM["pretrained_cfg"] | {"input_size": 96}, "model_args": {}}, "input_size is 96"),
        ({"pretrained_cfg": TIMM["pretrained_cfg"] | {"input_size": 96}}, "config.json is damaged"),
    ):
        (other / "config.json").write_text(json.dumps(TIMM | change))
        with pytest.raises(UserError, match=message):
            load_vit(f"local-dir:{other}")


def test_code_of_a_folder_never_runs(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark, folder = tmp_path / "ran", tmp_path / "evil"
    shutil.copytree(clips, folder)
    code = f"open({str(mark)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Own, BertConfig as OwnConfig"
    (folder / "own.py").write_text(code)
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}))
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    name = f"local-dir:{folder}"
    with pytest.raises(UserError, match="custom code"):
        load_tokenizer(name)
    text = SMALL["text_cfg"]
    _changed(folder, model_cfg=SMALL | {"text_cfg": text | {"hf_model_name": str(folder), "hf_proj_type": "linear"}})
    with pytest.raises(UserError, match="custom code"):
        load_clip(name, "random")
    _changed(folder, model_cfg=SMALL | {"text_cfg": text | {"tokenizer_kwargs": {"trust_remote_code": True}}})
    with pytest.raises(UserError, match="never run"):
        load_tokenizer(name)
    assert not mark.exists()


def test_no_part_of_a_folder_may_ask_to_run_code(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    folder = shutil.copytree(clips, tmp_path / "clip")
    _changed(folder, model_cfg=SMALL)  # names neither a tokenizer nor a text tower
    seen = []

    def stopped(*args: Any, **options: Any) -> None:
        seen.append(dynamic_module_utils.TIME_OUT_REMOTE_CODE)
        raise OSError

    for function, load in (("get_tokenizer", load_tokenizer), ("create_model", meta_clip)):
        monkeypatch.setattr(open_clip, function, stopped)
        with pytest.raises(UserError):
            load(f"local-dir:{folder}")
    assert seen == [0, 0]
