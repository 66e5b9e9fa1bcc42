from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import LoRA, RandLoRA, inject
from randlora_pl.models import (
    ImageTower,
    cast_frozen,
    compile_blocks,
    execution,
    load_clip,
    load_vit,
    meta_clip,
    meta_vit,
)
from randlora_pl.models.execution import repeated_blocks
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item
from tests.tasks.small import two_blocks

CPU = torch.device("cpu")
Make = Callable[[], tuple[nn.Module, Tensor]]


def clip() -> tuple[nn.Module, Tensor]:
    with two_blocks():
        model = ImageTower(load_clip("tiny", "random").model)
    return model, torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit() -> tuple[nn.Module, Tensor]:
    loaded = load_vit("test_vit", "random")
    size = loaded.image.size
    return loaded.model, torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[clip, vit])
def backbone(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    found: tuple[nn.Module, Tensor] = request.param()
    return found


def gradients(model: nn.Module, images: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(images).float()
    output.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm() + 1e-12, name


def test_only_frozen_matrices_are_cast_and_gradients_stay(backbone: tuple[nn.Module, Tensor]) -> None:
    model, images = backbone
    inject(model, RandLoRA(rank=4))
    expected = gradients(model, images, autocast=True)
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    cast_frozen(model, torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    cast = {name for name, dtype in kinds.items() if dtype == torch.bfloat16}
    assert any(name.endswith("fc1.weight") or name.endswith("c_fc.weight") for name in cast)
    assert not any(".delta." in name or "norm" in name or "ln_" in name or "pos" in name for name in cast)
    assert kinds[next(name for name in kinds if "norm" in name or "ln_" in name)] == torch.float32
    assert sum(p.numel() * p.element_size() for p in model.parameters()) < 0.7 * before
    found = gradients(model, images, autocast=True)
    assert all(value.dtype == torch.float32 for value in found.values())
    close(found, expected, 0.05)


def test_quantized_weights_are_not_cast() -> None:
    """Packed integers, as bitsandbytes keeps them in layers that are linear layers to PyTorch."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    model[0].weight = nn.Parameter(torch.arange(8, dtype=torch.uint8)[:, None], requires_grad=False)
    assert cast_frozen(model, torch.bfloat16) == 2  # one of them is packed
    assert (model[0].weight.dtype, model[1].weight.dtype) == (torch.uint8, torch.bfloat16)


@pytest.mark.parametrize(
    "adapter",
    [
        RandLoRA(rank=4),
        *(pytest.param(other, marks=pytest.mark.full) for other in (RandLoRA(rank=4, basis="hadamard"), LoRA(rank=2))),
    ],
)
@pytest.mark.parametrize("backbone", [clip, pytest.param(vit, marks=pytest.mark.full)], indirect=True)
def test_compiled_blocks_give_the_same_gradients_under_the_same_names(
    backbone: tuple[nn.Module, Tensor], adapter: Any
) -> None:
    model, images = backbone
    inject(model, adapter)
    expected, names = gradients(model, images), list(model.state_dict())
    compiled: list[Any] = []
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        original = nn.Module.compile

        def count(module: nn.Module, *args: Any, **options: Any) -> None:
            compiled.append(module)
            original(module, *args, **options)

        patch.setattr(nn.Module, "compile", count)
        compile_blocks(model, "aot_eager", CPU)
    assert len(compiled) == len(list(model.get_submodule(BLOCKS[type(model)]).children()))
    assert all(block._compiled_call_impl is not None for block in compiled)
    close(gradients(model, images), expected, 1e-4)
    assert list(model.state_dict()) == names


BLOCKS: dict[type[nn.Module], str] = {
    ImageTower: "visual.transformer.resblocks",
    type(load_vit("test_vit", "random").model): "blocks",
}


@in_one_item(
    ("backend", "model", "compilers", "says"),
    [
        ("induktor", clip, True, "Did you mean 'inductor'"),
        ("reduce_overhead", clip, True, "Did you mean 'reduce-overhead'"),
        ("max-autotune", clip, False, "Install g\\+\\+"),
        ("inductor", clip, False, "Install g\\+\\+"),
        ("eager", lambda: (nn.Linear(2, 2), torch.zeros(1)), True, "no repeated blocks in Linear"),
    ],
)
def test_what_cannot_be_compiled_is_told(
    backend: str, model: Make, compilers: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution.shutil, "which", lambda name: name if compilers else None)
    with pytest.raises(UserError, match=says):
        compile_blocks(model()[0], backend, CPU)


# Blocks are found in every kind of backbone, with nearly all of its weights


@pytest.mark.parametrize(
    ("model", "first", "count", "share"),
    [
        (lambda: meta_clip("tiny"), "visual.transformer.resblocks.0", 10, 0.8),
        (lambda: ImageTower(meta_clip("tiny")), "visual.transformer.resblocks.0", 6, 0.9),
        (lambda: meta_clip("ViT-B-16-SigLIP"), "visual.trunk.blocks.0", 24, 0.8),
        (lambda: meta_vit("vit_tiny_patch16_224"), "blocks.0", 12, 0.9),
        (lambda: meta_vit("swin_tiny_patch4_window7_224"), "layers.0.blocks.0", 12, 0.9),
    ],
)
def test_blocks_hold_nearly_all_weights(model: Callable[[], nn.Module], first: str, count: int, share: float) -> None:
    built = model()
    blocks = repeated_blocks(built)
    assert (next(iter(blocks)), len(blocks)) == (first, count)
    inside = [parameter for block in blocks.values() for parameter in block.parameters()]
    assert len(set(inside)) == len(inside)
    assert sum(p.numel() for p in inside) > share * sum(p.numel() for p in built.parameters())


def test_sequences_of_layers_are_no_blocks_and_an_adapter_changes_none() -> None:
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == {}
    assert repeated_blocks(nn.Sequential(nn.Sequential(nn.Linear(2, 2)))) == {}

    def block() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))

    model = nn.ModuleList([block(), block()])
    inject(model, LoRA(rank=1))
    assert list(repeated_blocks(model)) == ["0", "1"]
