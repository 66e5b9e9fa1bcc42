import logging

import open_clip
import pytest
import timm
import torch
from torch import nn

from randlora_pl.models.clip import ImageTower, load_clip
from randlora_pl.models.weights import quiet, seeded, set_gradient_checkpointing
from randlora_pl.utils.errors import UserError


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
