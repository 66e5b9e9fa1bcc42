"""Fits of LoRA and RandLoRA to given matrices, against slow references and the modules that train."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from randlora_pl.adapters import FullFineTuning, LoRA, RandLoRA, inject, read_adapter, save_adapter
from randlora_pl.adapters.operations import delta_weights
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.lab.analysis.weights import (
    combined,
    common_layers,
    curve,
    directions,
    fit,
    layer_spectrum,
    matrix_updates,
    mean_error,
    means,
    orthonormal,
    remaining,
    represent,
    segments,
    spectrum_figure,
)
from randlora_pl.models import load_clip
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item
from tests.tasks.small import two_blocks


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_sum(b: Tensor, a: Tensor, lambdas: Tensor, gammas: Tensor) -> Tensor:
    """Equation 4, term by term."""
    return sum(  # type: ignore[return-value]
        b[:, j] @ torch.diag(lambdas[j]) @ a @ torch.diag(gammas[j]) for j in range(b.shape[1])
    )


@settings(max_examples=8)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 3), st.integers(4, 8), st.integers(0, 4))
def test_no_sweep_makes_it_worse_and_lambda_is_the_best(seed: int, n: int, r: int, d: int, more: int) -> None:
    w, b, a = noise(seed, d + more, d), noise(seed + 1, d + more, n, r), noise(seed + 2, r, d)
    found = fit(w, b, a, sweeps=300, tolerance=0)
    assert all(after <= before + 1e-9 for before, after in zip(found.errors, found.errors[1:], strict=False))
    lambdas = found.lambdas.clone().requires_grad_()
    error = (w - slow_sum(b, a, lambdas, found.gammas)).square().sum() / w.square().sum()
    assert float(error.detach()) == pytest.approx(found.error**2, abs=1e-9)
    error.backward()
    assert lambdas.grad is not None and float(lambdas.grad.norm()) < 1e-3  # it was solved for last


def test_half_steps_are_least_squares() -> None:
    """One sweep against dense least squares over an explicit design matrix."""
    w, b, a = noise(0, 9, 4), noise(1, 9, 3, 2), noise(2, 2, 4)
    found = fit(w, b, a, sweeps=1)
    ones = torch.ones(3, 2, dtype=torch.float64)
    units = torch.eye(12, dtype=torch.float64)
    design = torch.stack([slow_sum(b, a, ones, unit.view(3, 4)).flatten() for unit in units], 1)
    gammas = torch.linalg.lstsq(design, w.flatten()).solution.view(3, 4)
    design = torch.stack([slow_sum(b, a, unit.view(3, 2), gammas).flatten() for unit in units[:6, :6]], 1)
    lambdas = torch.linalg.lstsq(design, w.flatten()).solution.view(3, 2)
    torch.testing.assert_close(
        combined(b, a, found.lambdas, found.gammas), slow_sum(b, a, lambdas, gammas), atol=1e-7, rtol=1e-6
    )


def test_segments_of_a_matrix_add_up_and_bound_the_error() -> None:
    w, b, a = noise(0, 8, 6), noise(1, 8, 3, 2), noise(2, 2, 6)
    found = segments(w, b, a, sweeps=50)
    assert len(found) == 3
    values = torch.linalg.svdvals(w)
    assert all(error <= float(values[2 * j : 2 * j + 2].norm()) + 1e-9 for j, error in enumerate(found))
    # Each segment's own fit makes a sum whose error equation 7 bounds; fitting all at once does better than that.
    assert fit(w, b, a, sweeps=200).error * float(w.norm()) <= 3 * max(found)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (8, 8)])
def test_a_layer_is_what_the_modules_can_do(shape: tuple[int, int]) -> None:
    update = noise(5, *shape).float()
    lora, randlora = LoRA(rank=3), RandLoRA(rank=2)
    weight = WeightShape("layer", *shape)
    bases = randlora.bases([weight], torch.device("cpu"))
    found = represent("layer", update, lora, randlora, bases)
    values = torch.linalg.svdvals(update.double())
    assert found.lora == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-6)  # equation 8
    assert found.lora_parameters == 3 * sum(shape) and found.randlora_parameters == 4 * (2 + 8)
    assert 0 < found.randlora < 1 and found.bound >= found.randlora
    # the trained module, given what was fitted
    delta = randlora.delta_weight(weight, torch.empty(shape), bases)
    w = update if shape[0] >= shape[1] else update.T
    fitted = fit(w, bases.B, bases.A[0])
    with torch.no_grad():
        delta.lambdas.copy_(fitted.lambdas / (delta.scaling * bases.scale))  # type: ignore[operator, union-attr]
        delta.gammas.copy_(fitted.gammas)  # type: ignore[operator, union-attr]
        left = float((update - delta.change(torch.empty(0))).norm() / update.norm())
    assert left == pytest.approx(found.randlora, abs=1e-5)


def test_an_update_of_zero_is_expressed_without_error() -> None:
    randlora = RandLoRA(rank=2)
    bases = randlora.bases([WeightShape("layer", 8, 8)], torch.device("cpu"))
    found = represent("layer", torch.zeros(8, 8), LoRA(rank=2), randlora, bases)
    assert (found.lora, found.randlora, found.bound) == (0, 0, 0)
    assert mean_error([found], "lora") == 0 and math.isfinite(mean_error([], "lora"))


@in_one_item(("large", "small", "count", "rank"), [(12, 8, 4, 2), (8, 8, 3, 3), (9, 6, 2, 3), (20, 6, 3, 2)])
def test_the_closed_form_is_the_fit(large: int, small: int, count: int, rank: int) -> None:
    """Orthonormal bases and signs, also with fewer directions than blocks and more columns than rows."""
    w, signs = noise(0, large, small), noise(1, rank, small).sign()
    for lead in (None, noise(2, large, 1), directions(noise(3, large, small))):
        b = orthonormal(noise(4, large, count, rank), lead)
        kept = torch.arange(count * rank).view(rank, count).T.flatten() < large
        torch.testing.assert_close(b.flatten(1).T @ b.flatten(1), torch.diag(kept.double()))
        slow = (w - b.flatten(1) @ b.flatten(1).T @ w).square().sum()
        for j in range(count):
            c = b[:, j].T @ w
            slow += c.square().sum() - torch.linalg.matrix_norm(signs * c, 2) ** 2
        found = remaining(w, b, signs)
        assert found == pytest.approx(math.sqrt(slow / w.square().sum()), abs=1e-9)
        assert found == pytest.approx(fit(w, b, signs, sweeps=3000, tolerance=0).error, abs=1e-6)


def test_leads_are_captured_and_random_bases_are_as_good_as_the_product_s() -> None:
    w, count, rank = noise(0, 96, 48) @ torch.diag(1 / torch.arange(1, 49).double()), 12, 4
    bases = RandLoRA(rank=rank).bases([WeightShape("layer", 96, 48)], torch.device("cpu"))
    signs = bases.A[0].sign()
    captured = [1 - remaining(w, orthonormal(bases.B, lead), signs) ** 2 for lead in (None, directions(w))]
    assert captured[0] == pytest.approx(1 - fit(w, bases.B, bases.A[0]).error ** 2, abs=0.03)
    values = torch.linalg.svdvals(w).square()
    assert captured[1] >= float(values[:count].sum() / values.sum()) > 2 * captured[0]
    one = torch.outer(noise(1, 96), noise(2, 48))
    assert directions(one).shape == directions(one.T).shape == (96, 1)
    assert remaining(one, orthonormal(bases.B, directions(one)), signs) < 1e-6
    assert remaining(0 * w, orthonormal(bases.B), signs) == 0


WIDTH = {"visual": 192, "transformer": 128}


def saved(folder: Path, adapter: Any) -> tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """An adapter of the tiny CLIP that has moved: its file, the base's weights and the model's."""
    clip = load_clip("tiny", "random")
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    inject(clip.model, adapter)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in clip.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    path = save_adapter(clip.model, folder, base_model=clip.identity.as_dict())
    after = dict(clip.model.state_dict()) if adapter.trains_base else delta_weights(clip.model)
    return path, before, after


def test_low_and_full_rank_and_full_fine_tuning(tmp_path: Path) -> None:
    with two_blocks():
        adapters = {"lora": LoRA(rank=3), "randlora": RandLoRA(rank=8), "full": FullFineTuning()}
        found = {}
        for name, adapter in adapters.items():
            path, before, after = saved(tmp_path / name, adapter)
            updates = matrix_updates(read_adapter(path))
            if name == "full":
                assert not any("ln_" in layer or "embedding" in layer for layer in updates)
                key = "visual.transformer.resblocks.1.attn.in_proj"
                torch.testing.assert_close(updates[key], after[f"{key}_weight"] - before[f"{key}_weight"])
                key = "transformer.resblocks.0.mlp.c_proj"
                torch.testing.assert_close(updates[key], after[f"{key}.weight"] - before[f"{key}.weight"])
            else:
                assert updates.keys() == after.keys()
                for layer, update in updates.items():
                    torch.testing.assert_close(update, after[layer])
            found[name] = [layer_spectrum(layer, update) for layer, update in updates.items()]
    assert {one.sizes.rank for one in found["lora"]} == {3}
    for name in ("randlora", "full"):
        assert all(one.sizes.rank >= 0.97 * len(one.values) for one in found[name])
    for one in found["full"]:
        assert len(one.values) == min(one.shape) == WIDTH[one.layer.split(".")[0]]
        assert one.sizes.norm == pytest.approx(float(one.values.norm()), rel=1e-9)
    shared = common_layers(list(found.values()))
    assert shared == [one.layer for one in found["lora"]] and len(shared) == 12
    assert len(found["full"]) == 17  # the output projections and the patch embedding, too
    assert means(found["lora"]) | {"rank": 3.0, "full_rank": 160.0} == means(found["lora"])
    figure = spectrum_figure(found)
    assert [len(axes.get_lines()) for axes in figure.axes] == [3, 3, 3]
    assert len(figure.axes[1].get_lines()[2].get_xdata()) == 12  # type: ignore[arg-type]


def test_curves_of_layers_of_different_width_are_put_together() -> None:
    layers = [layer_spectrum("a", torch.diag(torch.tensor([4.0, 2.0, 1.0]))), layer_spectrum("b", torch.eye(5) * 7)]
    shares, middle, low, high = curve(layers, 5)
    assert shares.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert high.tolist() == [1] * 5 and low.tolist() == [1, 0.75, 0.5, 0.375, 0.25]
    assert middle.tolist() == [1, 0.875, 0.75, 0.6875, 0.625]
    empty = curve([layer_spectrum("zero", torch.zeros(3, 3))], 5)
    assert all(value != value for value in empty[1].tolist())


def test_an_update_that_is_not_finite_is_named() -> None:
    with pytest.raises(UserError, match=r"some\.layer"):
        layer_spectrum("some.layer", torch.full((2, 2), float("nan")))


def test_full_fine_tuning_of_conv1d_is_seen(tmp_path: Path) -> None:
    """GPT-2's linear layers are transformers' Conv1D, whose weights are stored (in, out)."""
    pytest.importorskip("transformers", reason="pip install '.[language]'")
    from tests.language.small import make

    task = make("bytes", "gpt2", adapter=FullFineTuning(), overrides={"vocab_size": 260})
    task.adapt()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    updates = matrix_updates(read_adapter(task.save(tmp_path / "adapter")))
    layers = {f"transformer.h.{block}.{name}" for block in (0, 1) for name in (
        "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"
    )}  # fmt: skip
    assert layers <= updates.keys() <= layers | {"lm_head"}
    for layer in layers:
        change = task.model.state_dict()[f"{layer}.weight"] - before[f"{layer}.weight"]
        torch.testing.assert_close(updates[layer], change.T)
    assert updates["transformer.h.0.mlp.c_fc"].shape == (192, 48)
