import argparse
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from randlora_pl.models.clip import ImageTower, load_clip
from randlora_pl.models.weights import mismatch, quiet, read_weights, seeded, set_gradient_checkpointing
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.weights_files import file_sha256, looks_like_file
from tests.support.products import in_one_item

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2.5)}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_paths_are_told_from_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(looks_like_file(value) for value in ("a/b", "x.safetensors", "X.PT", "w.npz", "C:\\w"))
    assert not looks_like_file("laion2b_s34b_b79k")
    monkeypatch.chdir(tmp_path)
    Path("mine").write_bytes(b"")
    assert looks_like_file("mine")


def test_both_formats_are_read_by_content_and_hashed_by_bytes(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    torch.save(STATE, tmp_path / "w.pt")
    (tmp_path / "blob").write_bytes((tmp_path / "w.safetensors").read_bytes())  # no suffix, as in a cache
    for name in ("w.safetensors", "w.pt", "blob"):
        assert same(read_weights(tmp_path / name), STATE)
    (tmp_path / "w").write_bytes(b"abc")  # the test vector of FIPS 180-2
    assert file_sha256(tmp_path / "w") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@in_one_item("wrapper", ["state_dict", "model", "model_ema"])
@in_one_item("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappings_are_removed(tmp_path: Path, wrapper: str, prefix: str) -> None:
    torch.save({"epoch": 3, wrapper: {prefix + name: value for name, value in STATE.items()}}, tmp_path / "w.pt")
    assert same(read_weights(tmp_path / "w.pt"), STATE)


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("was_here",)


@pytest.mark.parametrize("by", ["torch", "pickle"])
def test_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"a": Malicious()}
    if by == "torch":
        torch.save(content, "evil.pt")
    else:
        Path("evil.pt").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match=r"evil\.pt"):
        read_weights("evil.pt")
    assert not Path("was_here").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forbidden_objects_are_named_and_torchscript_is_explained(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(), "state_dict": STATE}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"argparse\.Namespace"):
        read_weights(tmp_path / "w.pt")
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "jit.pt")
    with pytest.raises(UserError, match="TorchScript"):
        read_weights(tmp_path / "jit.pt")


def test_damaged_files(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "w.pt")
    save_file({"a": torch.zeros(1000)}, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for size in (0, 5, 60, len(whole) // 2, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(UserError, match=f"{name}.*Download or copy it again"):
                read_weights(tmp_path / name)
    (tmp_path / "page.bin").write_text("<html>not found</html>")
    with pytest.raises(UserError, match="damaged"):
        read_weights(tmp_path / "page.bin")


def test_files_without_named_tensors_missing_ones_and_folders(tmp_path: Path) -> None:
    for content in ({}, [torch.zeros(1)], {"a": 1}, torch.zeros(2)):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(UserError, match="tensors"):
            read_weights(tmp_path / "w.pt")
    with pytest.raises(UserError, match="exist"):
        read_weights(tmp_path / "other.pt")
    with pytest.raises(UserError, match="is a folder"):
        read_weights(tmp_path)


def test_mismatches_name_at_most_three_of_each_kind() -> None:
    model = nn.ModuleDict({f"layer{i}": nn.Linear(2, 2) for i in range(5)})
    state = model.state_dict()
    for i in range(2):
        del state[f"layer{i}.weight"], state[f"layer{i}.bias"]
    state |= {f"new{i}.x": torch.zeros(1) for i in range(2)}
    state["layer4.weight"] = torch.zeros(3, 2)
    with pytest.raises(RuntimeError) as info:
        model.load_state_dict(state)
    message = mismatch("weights 'w.pt' for Toy", str(info.value))
    assert message.startswith("weights 'w.pt' for Toy: does not fit this architecture")
    assert all(name in message for name in ("layer0.weight", "new0.x", "layer4.weight")) and "\n" not in message


# Seeds, loggers, and gradient checkpointing


def test_seeded_blocks_are_pure_and_leave_no_trace() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with seeded(5):
        first = torch.randn(4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), seeded(5):
            again = torch.randn(4)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.dtype == torch.float32
    assert again.device.type == "cpu"
    assert torch.equal(first, again)
    with pytest.raises(ZeroDivisionError), seeded(5):
        torch.randn(1)
        _ = 1 / 0
    assert torch.equal(torch.get_rng_state(), state)


def test_quiet_silences_the_root_logger_only(caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger()
    handlers = list(root.handlers)
    with caplog.at_level(logging.INFO), quiet():
        logging.warning("of open_clip")
        logging.getLogger("randlora_pl").info("of the application")
    logging.warning("afterwards")
    assert [record.message for record in caplog.records] == ["of the application", "afterwards"]
    assert root.handlers == handlers


def gradient(model: nn.Module, image: torch.Tensor, name: str) -> torch.Tensor:
    """Gradient of one weight in an otherwise frozen model, as an adapter has it."""
    model.zero_grad()
    for other, parameter in model.named_parameters():
        parameter.requires_grad_(other == name)
    model(image).square().sum().backward()
    found = model.get_parameter(name).grad
    assert found is not None
    return found.clone()


@pytest.mark.parametrize("kind", ["open_clip", "timm tower", "timm"])
def test_checkpointing_keeps_the_gradient_of_a_frozen_model(kind: str) -> None:
    if kind == "timm":
        model: nn.Module = timm.create_model("test_vit", num_classes=0)
        name, size = "blocks.0.mlp.fc1.weight", 160
    else:
        clip = load_clip("Small" if kind == "open_clip" else "Small-timm")
        model, size = ImageTower(clip.model), clip.image.size
        block = "visual.transformer.resblocks.0.mlp.c_fc" if kind == "open_clip" else "visual.trunk.blocks.0.mlp.fc1"
        name = f"{block}.weight"
    image = torch.randn(2, 3, size, size)
    plain = gradient(model, image, name)
    assert plain.abs().max() > 0
    set_gradient_checkpointing(model, True)
    assert any(getattr(module, "grad_checkpointing", False) for module in model.modules())
    torch.testing.assert_close(gradient(model, image, name), plain)
    set_gradient_checkpointing(model, False)
    assert not any(getattr(module, "grad_checkpointing", False) for module in model.modules())


def test_checkpointing_reaches_both_towers_or_is_refused() -> None:
    model = load_clip("Small-custom").model
    set_gradient_checkpointing(model)
    assert model.visual.transformer.grad_checkpointing
    assert model.text.transformer.grad_checkpointing
    set_gradient_checkpointing(model)  # again: nothing to do
    with pytest.raises(UserError, match="checkpointing"):
        set_gradient_checkpointing(nn.Linear(1, 1))
    set_gradient_checkpointing(nn.Linear(1, 1), False)
    resnet = open_clip.create_model("Small-resnet").visual  # its switch does nothing
    with pytest.raises(UserError, match="cannot switch"):
        set_gradient_checkpointing(resnet)
