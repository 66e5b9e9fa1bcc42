"""Modules that train whole beside an adapter, such as a new head: in files, hashes and plain models."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import (
    Adapter,
    AdapterSet,
    BitFit,
    DoRA,
    FullFineTuning,
    LinearProbe,
    LoRA,
    RandLoRA,
    disabled,
    inject,
    load_adapter,
    merge_and_unload,
    read_adapter,
    save_adapter,
    set_train_mode,
    trainable_parameters,
)
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import assert_close, randomise


def net(head: int = 0, classes: int = 3) -> nn.Sequential:
    """The same backbone with another fresh head for each number."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU()]
    torch.manual_seed(100 + head)
    return nn.Sequential(*layers, nn.Linear(12, classes))


def inputs() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(9))


def tuned(adapter: Adapter, targets: list[str] | None = None, trained: list[str] | None = None) -> nn.Sequential:
    model = net()
    inject(model, adapter, targets, trained)
    randomise(model)
    return model


@pytest.mark.parametrize(
    ("adapter", "targets"),
    [
        (LoRA(rank=2), ["0", "2"]),
        (RandLoRA(rank=2), None),
        (LinearProbe(), None),
        (BitFit(), None),
        (FullFineTuning(), None),
    ],
    ids=lambda value: value.method() if isinstance(value, Adapter) else "",
)
def test_a_trained_head_goes_into_a_model_with_another_fresh_head(
    adapter: Adapter, targets: list[str] | None, tmp_path: Path
) -> None:
    model = tuned(adapter, targets, ["4"])
    assert {"4.weight", "4.bias"} <= trainable_parameters(model).keys()
    assert not any(name.startswith("4.delta") for name in trainable_parameters(model))
    save_adapter(model, tmp_path / "a")
    file = read_adapter(tmp_path / "a")
    assert (file.trained, file.kept) == (["4"], [])
    fresh = net(head=1)
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(inputs()), model(inputs()))
    load_adapter(fresh, tmp_path / "a")  # where it is in place already
    other = net(head=1)
    with torch.no_grad():
        other[2].weight.add_(1)
    with pytest.raises(UserError, match="different weights"):
        load_adapter(other, tmp_path / "a")
    with pytest.raises(UserError, match=r"4\.bias"):
        load_adapter(net(classes=7), tmp_path / "a")


def test_a_head_that_a_user_unfreezes_is_saved_as_if_it_were_in_trained(tmp_path: Path) -> None:
    model = net()
    inject(model, LoRA(rank=2), ["0", "2"])
    model[4].requires_grad_(True)
    randomise(model)
    save_adapter(model, tmp_path / "a")
    for prepare in (
        lambda fresh: None,
        lambda fresh: (inject(fresh, LoRA(rank=2), ["0", "2"]), fresh[4].requires_grad_()),
    ):
        fresh = net(head=1)
        prepare(fresh)
        load_adapter(fresh, tmp_path / "a")
        assert torch.equal(fresh(inputs()), model(inputs()))
    model.requires_grad_(False)  # a model that is frozen for good has trained all the same
    save_adapter(model, tmp_path / "b")
    assert any("delta" in name for name in read_adapter(tmp_path / "b").tensors)


def test_the_report_names_what_trains_and_a_head_that_does_not() -> None:
    report = inject(net(), LoRA(rank=2), ["0", "2"])
    assert report.frozen_heads == ["4"]
    assert "trained=['4']" in str(report)
    report = inject(net(), LoRA(rank=2), ["0", "2"], ["4"])
    assert report.frozen_heads == []
    assert [(row.layer, row.shape) for row in report.beside] == [("4.weight", (3, 12)), ("4.bias", (3,))]
    assert report.trainable == 2 * (8 + 12 + 12 + 12) + 39
    assert "4.bias" in str(report)
    assert inject(net(), FullFineTuning()).frozen_heads == []


@pytest.mark.parametrize(
    ("trained", "match"),
    [(["heat"], "Did you mean 'head'"), (["("], "regular expression"), (["body", "head"], "nothing is adapted")],
)
def test_patterns_that_are_refused(trained: list[str], match: str) -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    with pytest.raises(UserError, match=match):
        inject(model, LoRA(rank=2), None, trained)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model, "adapter_report")


def test_modes() -> None:
    """A new update takes its layer's mode; in training, what trains whole trains, and the rest rests."""
    head = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(12), nn.Linear(12, 3))
    model = nn.ModuleDict({"body": nn.Linear(8, 12), "norm": nn.BatchNorm1d(12), "head": head})
    for mode in (False, True):
        each = copy.deepcopy(model).train(mode)
        inject(each, DoRA(LoRA(rank=2, dropout=0.5)), ["body"], ["head"])
        assert {module.training for module in each.modules()} == {mode}
        set_train_mode(each)
        training = {name for name, module in each.named_modules() if module.training}
        assert training == {"body.delta", "body.delta.inner", "head", "head.0", "head.1", "head.2"}
        set_train_mode(each, False)
        assert not any(module.training for module in each.modules())


def test_an_adapter_in_a_model_in_eval_mode_drops_nothing(tmp_path: Path) -> None:
    model = net()
    inject(model, RandLoRA(rank=2, dropout=0.5), ["0", "2"])
    randomise(model)
    save_adapter(model, tmp_path / "a")
    fresh = net().eval()
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(inputs()), fresh(inputs()))


def test_heads_take_turns_in_a_set(tmp_path: Path) -> None:
    model = tuned(LoRA(rank=2), ["0", "2"], ["4"])
    save_adapter(model, tmp_path / "a")
    adapters = AdapterSet(net(head=1))
    adapters.load("a", tmp_path / "a")
    with adapters.using("a"):
        assert torch.equal(adapters.model(inputs()), model(inputs()))
        assert trainable_parameters(adapters.model).keys() == trainable_parameters(model).keys()
    assert torch.equal(adapters.model(inputs()), net(head=1)(inputs()))
    with pytest.raises(UserError, match="own tensors"):
        adapters.use({"a": 0.5})


def test_disabling_leaves_the_trained_head() -> None:
    model = tuned(LoRA(rank=2), ["0", "2"], ["4"])
    expected = net()
    expected[4].load_state_dict(model[4].state_dict())
    with disabled(model):
        assert_close(model(inputs()), expected(inputs()))


@pytest.mark.parametrize("adapter", [LoRA(rank=2), FullFineTuning()], ids=["lora", "full"])
def test_merge_and_unload_leaves_a_plain_model_that_trains(adapter: Adapter) -> None:
    model = tuned(adapter, None, ["4"])
    expected = model(inputs()).detach()
    assert merge_and_unload(model) is model
    assert_close(model(inputs()), expected)
    assert [type(module) for module in model] == [type(module) for module in net()]
    net().load_state_dict(model.state_dict())
    model(inputs()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_mismatch_ends_in_one_full_stop(tmp_path: Path) -> None:
    path = save_adapter(tuned(LoRA(rank=2), ["0"], ["4"]), tmp_path / "a")
    with pytest.raises(UserError, match="does not fit") as caught:
        load_adapter(net()[:1], path)
    assert not str(caught.value).endswith("..") and str(caught.value).endswith("'0'.")
