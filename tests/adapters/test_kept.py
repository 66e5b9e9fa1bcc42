"""Kept buffers: what training changes without a gradient is in the file, and comes back."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import (
    SVFT,
    AdaLoRA,
    Adapter,
    AdapterSet,
    AutoLoRA,
    BitFit,
    FullFineTuning,
    LinearProbe,
    LoRA,
    SHiRA,
    inject,
    load_adapter,
    read_adapter,
    save_adapter,
    set_train_mode,
)
from randlora_pl.adapters.trained import base_buffers, kept_buffers
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import edit, edit_tensors
from tests.support.products import in_one_item

STATISTICS = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6),
        nn.ReLU(), nn.Linear(6, 2),
    ).eval()  # fmt: skip


def tuned(adapter: Adapter, train: Callable[[nn.Module], Any], steps: int = 3) -> nn.Sequential:
    """A model that a user has trained for some steps, in eval mode."""
    model = net()
    inject(model, adapter)
    train(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for step in range(steps):
        x = 2 + 3 * torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().clamp(max=10).backward()
        optimizer.step()
        optimizer.zero_grad()
    set_train_mode(model, False)
    return model


def images() -> Tensor:
    return torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(9))


def same(model: nn.Module, other: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(model(images()), other(images()))


@pytest.mark.parametrize(
    ("adapter", "train"),
    [(FullFineTuning(), set_train_mode), (BitFit(), set_train_mode), (LoRA(rank=2), nn.Module.train)],
    ids=["full", "bitfit", "lora, model.train()"],
)
def test_moved_statistics_come_back(adapter: Adapter, train: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    model = tuned(adapter, train)
    save_adapter(model, tmp_path / "a")
    file = read_adapter(tmp_path / "a")
    assert set(file.kept) == STATISTICS
    assert file.config["format_version"] == 4
    fresh = net()
    load_adapter(fresh, tmp_path / "a")
    assert same(model, fresh)
    for name, value in base_buffers(model).items():
        assert torch.equal(base_buffers(fresh)[name], value)
    again = copy.deepcopy(fresh)
    save_adapter(again, tmp_path / "b")
    assert read_adapter(tmp_path / "b").config["sha256"] == file.config["sha256"]


@pytest.mark.parametrize("adapter", [LoRA(rank=2), LinearProbe()], ids=["lora", "probe"])
def test_statistics_of_a_frozen_base_rest_and_are_not_stored(adapter: Adapter, tmp_path: Path) -> None:
    model = net()
    inject(model, adapter)
    set_train_mode(model)
    model(images())
    assert kept_buffers(model) == {}
    save_adapter(model, tmp_path / "a")
    assert read_adapter(tmp_path / "a").kept == []


def test_reloading_in_place_puts_the_statistics_back(tmp_path: Path) -> None:
    model = net()
    inject(model, FullFineTuning())
    first = copy.deepcopy(model)
    save_adapter(model, tmp_path / "start")  # which keeps none, as nothing has moved
    model.train()(images())
    load_adapter(model.eval(), tmp_path / "start")
    assert same(model, first)


def test_a_set_of_adapters_switches_statistics(tmp_path: Path) -> None:
    full, lora = tuned(FullFineTuning(), set_train_mode), tuned(LoRA(rank=2), nn.Module.train)
    save_adapter(full, tmp_path / "full")
    save_adapter(lora, tmp_path / "lora")
    adapters = AdapterSet(net())
    adapters.load("full", tmp_path / "full")
    adapters.load("lora", tmp_path / "lora")
    for name, model in {"full": full, "lora": lora, "base": net()}.items():
        adapters.use(None if name == "base" else name)
        assert same(adapters.model, model), name
        assert len(kept_buffers(adapters.model)) == (0 if name == "base" else 3)
    with pytest.raises(UserError, match="own tensors"):
        adapters.use({"lora": 0.5})


def test_statistics_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    path = save_adapter(tuned(FullFineTuning(), set_train_mode), tmp_path / "a")
    whole = shutil.copytree(path, tmp_path / "b")
    edit_tensors(path, lambda tensors: tensors.update({"1.running_mean": torch.zeros(5)}))
    with pytest.raises(UserError, match=r"1\.running_mean"):
        load_adapter(net(), path)
    edit_tensors(path, lambda tensors: tensors.pop("1.running_mean"))
    with pytest.raises(UserError, match=r"1\.running_mean"):
        read_adapter(path)
    edit(whole, lambda config: config.update(kept=[]))
    with pytest.raises(UserError, match="num_batches_tracked"):
        load_adapter(net(), whole)


def test_a_set_parts_statistics_that_move_in_it(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_adapter(tuned(LoRA(rank=2), lambda model: None), tmp_path / name)
    base = net()
    adapters, before = AdapterSet(base), base(images())
    for name in ("a", "b"):
        adapters.load(name, tmp_path / name)
    for choice, remembered in (({"a": 0.5, "b": 0.5}, False), ("a", True)):
        adapters.use(choice)
        plain = base(images())
        base.train()(images())
        moved = base.eval()(images())
        assert not torch.equal(moved, plain)
        adapters.use(None)
        assert torch.equal(base(images()), before)
        adapters.use(choice)
        assert torch.equal(base(images()), moved) is remembered


class Remembering(nn.Linear):
    """Keeps what it computes from its bias until it trains, as attention of LeViT does."""

    def train(self, mode: bool = True) -> Any:
        self.computed = None if mode else getattr(self, "computed", None)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.computed is None:
            self.computed = self.bias.detach() * 2
        return x @ self.weight.T + self.computed


def test_a_used_model_forgets_what_it_computed_from_other_weights(tmp_path: Path) -> None:
    trained, used = (nn.Sequential(Remembering(2, 2)) for _ in range(2))
    used.load_state_dict(trained.state_dict())
    plain = used.eval()(torch.ones(1, 2))
    inject(trained, FullFineTuning())
    with torch.no_grad():
        trained[0].bias.add_(1)
    save_adapter(trained, tmp_path / "a")
    adapters = AdapterSet(used)
    adapters.load("a", tmp_path / "a")
    for choice, gain in (("a", 2), (None, 0)):
        adapters.use(choice)
        assert torch.allclose(used(torch.ones(1, 2)), plain + gain) and not used.training
    load_adapter(used, tmp_path / "a")
    assert torch.allclose(used(torch.ones(1, 2)), plain + 2)


# Kept buffers of a file that was made by hand are refused if a forward pass would fail with them


def _set(place: int, value: int) -> Callable[[Tensor], Tensor]:
    return lambda kept: kept.index_fill(0, torch.tensor(place), value)


SHIRA, TOP_K = SHiRA(rank=1), SVFT(pattern="top_k", off_diagonals=1)
IMPOSSIBLE: list[tuple[Adapter, Callable[[Tensor], Tensor], str]] = [
    *((SHIRA, _set(*change), r"fc\.delta\.places must be distinct places from 0 to 24, in asc") for change in [
        (0, -1), (-1, 25), (-1, 2**31 - 1),
    ]),
    *((TOP_K, _set(*change), r"places must be distinct places from 0 to 24") for change in [(0, -1), (-1, 25)]),
    *((each, lambda kept: kept[:1].expand_as(kept), "distinct places") for each in (SHIRA, TOP_K)),
    (SHIRA, lambda kept: kept.flip(0), "ascending order"),
    (SHIRA, lambda kept: kept.long() - 2**40, "distinct places"),
    (SHIRA, lambda kept: kept + 0.5, r"places is torch\.float32 in the file and torch\.int32 here"),
    (SHIRA, lambda kept: kept[1:], r"has shape \(9,\) in the file and \(10,\) here"),
    (AdaLoRA(rank=3), lambda kept: kept.float(), r"mask is torch\.float32 in the file and torch\.bool here"),
    (AdaLoRA(rank=3), lambda kept: kept[1:], r"mask has shape \(2,\) in the file and \(3,\) here"),
    (AutoLoRA(rank=3), lambda kept: kept.bool(), r"v is torch\.bool in the file and torch\.float32 here"),
    (AutoLoRA(rank=3), lambda kept: kept[1:], r"v has shape \(2,\)"),
]  # fmt: skip


@in_one_item(("adapter", "change", "message"), IMPOSSIBLE)
def test_impossible_kept_buffers_are_refused(
    adapter: Adapter, change: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    """Into the base model, and into one with the same adapter."""
    base = nn.ModuleDict({"fc": nn.Linear(5, 5)})
    model = copy.deepcopy(base)
    report = inject(model, adapter, ["fc"])
    if report.procedure is not None:
        report.procedure.ran = True
    save_adapter(model, tmp_path / "a")
    load_adapter(copy.deepcopy(base), tmp_path / "a")
    (name,) = read_adapter(tmp_path / "a").kept
    edit_tensors(tmp_path / "a", lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))
    before = copy.deepcopy(model.state_dict())
    for other in (base, model):
        with pytest.raises(UserError, match=message) as refusal:
            load_adapter(other, tmp_path / "a")
        assert "\n" not in str(refusal.value)
    assert not hasattr(base, "adapter_report")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
