"""Derived tensors: canonical factors of W0, a sketch of them in files, and the same bits in checkpoints."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import (
    SVFT,
    Adapter,
    LoRAXS,
    PiSSA,
    RandLoRA,
    Together,
    delta_weights,
    derived,
    inject,
    load_adapter,
    read_adapter,
    save_adapter,
    trainable_parameters,
)
from randlora_pl.adapters.derived import derived_buffers, derived_once, factors, sketch
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item

TARGETS = ["0", "2"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8))


def tuned(adapter: Adapter) -> nn.Module:
    model = net()
    inject(model, adapter, TARGETS)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images() -> Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


@in_one_item("sides", [(20, 12), (12, 20), (12, 12), (3, 12), (12, 1)])
def test_recipes_agree_with_the_decompositions(sides: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix, rank = torch.randn(*sides, dtype=torch.float64), min(3, *sides)
    u, s, v = factors("svd/1", matrix, min(sides))
    torch.testing.assert_close(u @ torch.diag(s) @ v, matrix)
    assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())
    for recipe, kept in (("gram/1", slice(rank)), ("svd/1", slice(rank))):
        for found, expected in zip(factors(recipe, matrix, rank), (u[:, kept], s[kept], v[kept]), strict=True):  # type: ignore[arg-type]
            torch.testing.assert_close(found, expected)
    left, values, _ = factors("minor/1", matrix, rank)
    torch.testing.assert_close(values, s.flip(0)[:rank])
    torch.testing.assert_close(left, u.flip(1)[:, :rank])
    q, _, r = factors("qr/1", matrix, rank)
    torch.testing.assert_close(q.T @ q, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close((q @ r)[:, :rank], matrix[:, :rank])
    assert bool((r.diagonal() > 0).all())


def test_a_weight_of_low_rank_has_no_infinite_factors() -> None:
    matrix = torch.outer(torch.arange(6.0), torch.arange(9.0)).double()
    for weight in (matrix, matrix.T, torch.zeros(4, 5).double()):
        left, values, right = factors("gram/1", weight, 3)
        assert left.isfinite().all() and right.isfinite().all()
        torch.testing.assert_close(left @ torch.diag(values) @ right, weight)
        model = nn.Sequential(nn.Linear(*weight.shape[::-1]))
        model[0].weight.data = weight.float()
        inject(model, LoRAXS(rank=3), ["0"])
        assert model(torch.randn(2, weight.shape[1])).isfinite().all()
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.data[1, 2] = torch.nan
    with pytest.raises(UserError, match="0: its weight is not finite"):
        inject(model, PiSSA(rank=2), ["0"])
    assert type(model[0]) is nn.Linear


def test_large_weights_are_iterated_and_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(derived, "LARGEST", 40)
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 60, dtype=torch.float64))[0] for size in (80, 60))
    matrix = left @ torch.diag(0.8 ** torch.arange(60.0).double()) @ right.T
    exact, found = factors("svd/1", matrix, 4), factors("gram/1", matrix, 4)
    for one, two in zip(exact, found, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    assert not derived.iterates(40, 4) and not derived.iterates(60, 20)
    model = nn.Sequential(nn.Linear(60, 80))
    model[0].weight.data = matrix.float()
    inject(model, LoRAXS(rank=4), ["0"])
    save_adapter(model, tmp_path / "a")
    assert read_adapter(tmp_path / "a").kept == ["0.delta.U", "0.delta.V"]


ADAPTERS = [PiSSA(rank=4), PiSSA(rank=4, start="minor"), LoRAXS(rank=4)]


@in_one_item("adapter", ADAPTERS)
def test_files_refuse_other_weights_dtypes_and_rotations(adapter: Adapter, tmp_path: Path) -> None:
    model = tuned(adapter)
    save_adapter(model, tmp_path / "a")
    assert read_adapter(tmp_path / "a").kept == []
    again = net()
    load_adapter(again, tmp_path / "a")
    assert torch.equal(again(images()), model(images()))
    load_adapter(again, tmp_path / "a")  # into the same adapter
    assert torch.equal(again(images()), model(images()))
    rounded = net()
    for parameter in rounded.parameters():  # the hash of the base rounds to bfloat16 as well
        parameter.data = parameter.data.bfloat16().float()
    for other in (rounded, net().bfloat16()):
        with pytest.raises(UserError, match=r"derived tensors differ .*other weights, .* dtype .* keep_derived=True"):
            load_adapter(other, tmp_path / "a")
        assert type(other[0]) is nn.Linear and other[0].weight.requires_grad


def test_a_file_with_the_derived_tensors_needs_no_decomposition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, adapter in enumerate([*ADAPTERS, Together([PiSSA(rank=4), RandLoRA(rank=4)])]):
        model, path = tuned(adapter), tmp_path / str(number)
        save_adapter(model, path, keep_derived=True)
        file = read_adapter(path)
        assert set(file.kept) == derived_buffers(model).keys() and file.derived == {}
        with monkeypatch.context() as no_lapack:
            no_lapack.setattr(derived, "factors", None)
            again = net()
            load_adapter(again, path)
        assert torch.equal(again(images()), model(images()))
        save_adapter(again, tmp_path / f"{number} again")
        assert read_adapter(tmp_path / f"{number} again").kept == file.kept
        load_adapter(model, path)  # into the same adapter, which does not store them
        save_adapter(model, path)
        assert read_adapter(path).kept == []
        load_adapter(again, path)
        derived_buffers(again)[file.kept[0]].add_(1)
        with pytest.raises(UserError, match="derived tensors differ"):
            load_adapter(again, path)


def test_equal_singular_values_are_refused_where_lapack_rotates_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = nn.Sequential(nn.Linear(8, 8))
    base[0].weight.data = 2 * torch.eye(8)
    state = base.state_dict()
    whole = derived.factors

    def rotated(recipe: derived.RecipeName, matrix: Tensor, rank: int) -> derived.Triple:
        turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
        left, values, right = whole(recipe, turn.T @ matrix, rank)
        return derived.canonical(turn @ left, values, right)

    # all of PiSSA's vectors have one product
    for adapter, fits in ((LoRAXS(rank=8), False), (SVFT(), False), (PiSSA(rank=8), True)):
        model = nn.Sequential(nn.Linear(8, 8))
        model.load_state_dict(state)
        inject(model, adapter, ["0"])
        save_adapter(model, tmp_path / adapter.method())
        other = nn.Sequential(nn.Linear(8, 8))
        other.load_state_dict(state)
        with monkeypatch.context() as lapack:
            lapack.setattr(derived, "factors", rotated)
            if fits:
                load_adapter(other, tmp_path / adapter.method())
                continue
            with pytest.raises(UserError, match=r"save with the derived tensors.*keep_derived=True"):
                load_adapter(other, tmp_path / adapter.method())


def test_each_weight_is_decomposed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(tuned(PiSSA(rank=4)), tmp_path / "a")
    calls = []
    whole = derived.factors
    monkeypatch.setattr(derived, "factors", lambda *given: calls.append(given) or whole(*given))
    load_adapter(net(), tmp_path / "a")
    assert len(calls) == 2  # for the check and for the model
    with derived_once():
        tuned(PiSSA(rank=4))
        tuned(PiSSA(rank=4))  # other options might make other tensors
    assert len(calls) == 6
    calls.clear()
    with torch.device("meta"):
        model = net()
    report = inject(model, PiSSA(rank=4), TARGETS)
    assert (report.trainable, calls) == (240, [])


def test_bits_survive_a_change_of_dtype() -> None:
    model = tuned(LoRAXS(rank=4))
    before = {name: tensor.clone() for name, tensor in derived_buffers(model).items()}
    model.bfloat16()
    assert model(images().bfloat16()).dtype == torch.bfloat16
    model.float()
    assert all(torch.equal(tensor, before[name]) for name, tensor in derived_buffers(model).items())
    double = tuned(PiSSA(rank=4)).double()
    assert double(images().double()).dtype == torch.float64
    assert all(delta.dtype == torch.float64 for delta in delta_weights(double).values())


def test_the_sketch_sees_small_changes_and_no_rounding() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(30, 4)
    there = {"a": sketch(matrix)}
    assert derived.sketch_problems(there, {"a": sketch(matrix * (1 + 1e-6))}) == []
    for other in (matrix * 1.001, matrix.flip(1), matrix * torch.tensor([1, 1, 1, -1])):
        assert derived.sketch_problems(there, {"a": sketch(other)})
    assert derived.sketch_problems(there, {}) and derived.sketch_problems({}, there)
