"""AdaLoRA: importance, budget and pruning against slow loops and PEFT; the update itself is tested by the contract."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from randlora_pl.adapters import AdaLoRA, inject, load_adapter, merge_and_unload, save_adapter
from randlora_pl.adapters.methods.adalora import AdaLoRADelta, Pruning
from tests.support.products import in_one_item

RANK, TARGET, LAYERS = 4, 2, 3


def model_of(**options: Any) -> tuple[nn.Module, Pruning]:
    """Three layers of different shapes with AdaLoRA-4, and the pruning of their ranks, started."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    settings: dict[str, Any] = {"rank": RANK, "target_rank": TARGET, "alpha": 40.0, "gamma": 0.0, "every": 1}
    report = inject(model, AdaLoRA(**(settings | options)), ["0", "2", "4"])
    assert isinstance(report.procedure, Pruning)
    report.procedure.start(model)
    return model, report.procedure


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    (model(x) - x[:, :5].sin()).square().mean().backward()
    optimizer.step()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


def kept(pruning: Pruning) -> list[int]:
    return [int(update.mask.sum()) for update in pruning.updates]


def alive(pruning: Pruning) -> list[list[bool]]:
    return [(update.E != 0).tolist() for update in pruning.updates]


class Slow:
    """The equations of importance, entry by entry, in Python's own numbers."""

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.mean: dict[Any, float] = {}
        self.deviation: dict[Any, float] = {}

    def see(self, updates: list[AdaLoRADelta]) -> None:
        for layer, update in enumerate(updates):
            for name, tensor in update.named_parameters():
                assert tensor.grad is not None
                for place in itertools.product(*map(range, tensor.shape)):
                    key = (layer, name, place)
                    importance = abs(float(tensor[place]) * float(tensor.grad[place]))
                    self.mean[key] = self.beta1 * self.mean.get(key, 0.0) + (1 - self.beta1) * importance
                    away = abs(importance - self.mean[key])
                    self.deviation[key] = self.beta2 * self.deviation.get(key, 0.0) + (1 - self.beta2) * away

    def scores(self, updates: list[AdaLoRADelta]) -> list[list[float]]:
        def score(layer: int, name: str, *place: int) -> float:
            return self.mean[layer, name, place] * self.deviation[layer, name, place]

        result = []
        for layer, update in enumerate(updates):
            rows, columns = len(update.B), update.A.shape[1]
            result.append(
                [
                    score(layer, "E", k)
                    + sum(score(layer, "A", k, i) for i in range(columns)) / columns
                    + sum(score(layer, "B", o, k) for o in range(rows)) / rows
                    for k in range(len(update.E))
                ]
            )
        return result


def test_importance_and_pruning_follow_the_slow_loop() -> None:
    """What is pruned comes back only before the final phase, and there scores no longer change."""
    total = 20
    model, pruning = model_of(warmup=0.2, final=0.25, beta1=0.8, beta2=0.7, every=3)
    assert pruning.phases(total) == (4, 15)
    slow, optimizer, updates = Slow(0.8, 0.7), optimizer_of(model), list(pruning.updates)
    pruned, came_back = set[tuple[int, int]](), False
    for t in range(total):
        step(model, optimizer, t)
        assert all(map(all, alive(pruning))), "all ranks train between two prunings"
        moved = copy.deepcopy([update.E.detach() for update in updates])
        frozen = pruning.scores()
        if t < 15:
            slow.see(updates)
        pruning.after_step(t, total)
        expected = slow.scores(updates)
        torch.testing.assert_close(pruning.scores(), torch.tensor(expected, dtype=torch.float64).flatten())
        if t >= 15:
            assert torch.equal(pruning.scores(), frozen)
            assert sum(kept(pruning)) == TARGET * LAYERS
        elif t <= 4 or t % 3:
            assert all(torch.equal(update.E, value) for update, value in zip(updates, moved, strict=True))
            continue
        places = [(score, -layer, -k) for layer, some in enumerate(expected) for k, score in enumerate(some)]
        best = sorted(places, reverse=True)[: pruning.budget(t, total)]
        for layer, update in enumerate(updates):
            chosen = [(-layer, -k) in {place[1:] for place in best} for k in range(RANK)]
            assert update.mask.tolist() == chosen
            assert torch.equal(update.E, moved[layer] * torch.tensor(chosen))
            gone = {(layer, k) for k in range(RANK) if not chosen[k]}
            came_back |= any(place not in gone for place in pruned if place[0] == layer)
            pruned = {place for place in pruned if place[0] != layer} | gone
        if t == 9:  # what is pruned gets larger gradients
            for update in updates:
                with torch.no_grad():
                    update.B[:, ~update.mask] *= 20
    assert came_back
    assert pruning.finish() == {
        "adalora/triplets": TARGET * LAYERS,
        "adalora/parameters": sum(n * size for n, size in zip(kept(pruning), (15, 17, 14), strict=True)),
        "adalora/ranks": dict(zip(("0", "2", "4"), kept(pruning), strict=True)),
    }


def test_the_ranks_that_are_kept_add_up_to_the_budget_with_equal_scores_too() -> None:
    """The released codes prune every rank of the model there, and fail where nothing is to be pruned."""
    for target, gradient in itertools.product((1, 2, 3, RANK), (0.0, 1.0)):
        _, pruning = model_of(target_rank=target, warmup=0.0, final=0.2)
        for t in range(15):
            for update in pruning.updates:
                for entry in update.parameters():
                    nn.init.ones_(entry)
                    entry.grad = torch.full_like(entry, gradient)
            pruning.after_step(t, 15)
            budget = pruning.budget(t, 15)
            assert t == 0 or sum(kept(pruning)) == sum(map(sum, alive(pruning))) == budget
        assert budget == target * LAYERS
        # the first, in the order of the layers
        assert kept(pruning) == [min(RANK, max(0, budget - RANK * layer)) for layer in range(LAYERS)]


def test_the_budget_falls_as_peft_s() -> None:
    for total, warmup, final in itertools.product((1, 2, 7, 100, 2000), (0.0, 0.1, 0.5), (0.0, 0.3, 0.45)):
        _, pruning = model_of(warmup=warmup, final=final)
        start, end = pruning.phases(total)
        assert 0 <= start <= end <= total - 1
        budgets = [pruning.budget(t, total) for t in range(total)]
        assert budgets == sorted(budgets, reverse=True) and budgets[-1] == TARGET * LAYERS
        assert start == end or budgets[: start + 1] == [RANK * LAYERS] * (start + 1)
        if start >= end:
            continue
        config = AdaLoraConfig(
            init_r=RANK,
            target_r=TARGET,
            tinit=start,
            tfinal=total - end,
            total_step=total,
            target_modules=["0", "2", "4"],
        )
        allocator: Any = get_peft_model(nn.Sequential(*(nn.Linear(3, 3) for _ in range(5))), config).base_model
        assert budgets == [allocator.rankallocator.budget_schedule(t)[0] for t in range(total)]


def test_peft_keeps_the_same_ranks() -> None:
    """Both train the same model; PEFT adds 1e-5 to the rank in its scaling."""
    total = 24
    model, pruning = model_of(warmup=0.125, final=0.25, every=2, alpha=40 * RANK / (RANK + 1e-5))
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".delta." not in name})
    config = AdaLoraConfig(
        init_r=RANK, target_r=TARGET, lora_alpha=40, tinit=3, tfinal=6, deltaT=2, total_step=total,
        target_modules=["0", "2", "4"],
    )  # fmt: skip
    theirs: Any = get_peft_model(plain, config).double()
    layers = [theirs.base_model.model[number] for number in (0, 2, 4)]
    for layer, update in zip(layers, pruning.updates, strict=True):
        with torch.no_grad():
            layer.lora_A["default"].copy_(update.A)
            layer.lora_B["default"].copy_(update.B)
    for layer in layers:  # PEFT 0.21 trains the rank by which it divides
        layer.ranknum.requires_grad_(False)
    optimizers = optimizer_of(model), optimizer_of(theirs)
    for t in range(total):
        step(model, optimizers[0], t)
        step(theirs, optimizers[1], t)
        pruning.after_step(t, total)
        theirs.base_model.update_and_allocate(t)
        for layer, update in zip(layers, pruning.updates, strict=True):
            torch.testing.assert_close(update.E, layer.lora_E["default"][:, 0], rtol=1e-6, atol=1e-9)
    assert sum(kept(pruning)) == TARGET * LAYERS


@in_one_item("form", ["code", "paper"])
def test_the_penalty_is_the_distance_from_orthonormal_factors(form: Any) -> None:
    _, pruning = model_of(gamma=0.3, orthogonality=form)
    distances = [
        float((rows @ rows.T - torch.eye(RANK)).square().sum()) ** (0.5 if form == "code" else 1)
        for update in pruning.updates
        for rows in (update.A.detach(), update.B.detach().T)
    ]
    expected = 0.3 * sum(distances) / (len(distances) if form == "code" else 1)
    penalty = pruning.penalty()
    assert penalty is not None and penalty.item() == pytest.approx(expected, rel=1e-9)
    penalty.backward()
    assert all(update.A.grad is not None and update.A.grad.any() for update in pruning.updates)
    for update in pruning.updates:  # orthonormal: the norm has no derivative there, and zero is taken
        for tensor in (update.A, update.B):
            tensor.grad = None
            nn.init.eye_(tensor)
    penalty = pruning.penalty()
    assert penalty is not None and penalty.item() == 0
    penalty.backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for u in pruning.updates for tensor in (u.A, u.B))
    with torch.autocast("cpu", torch.bfloat16):
        nn.init.normal_(pruning.updates[0].A)
        assert pruning.penalty() != 0 and (again := pruning.penalty()) is not None and again.dtype == torch.float64
    assert model_of(gamma=0.0)[1].penalty() is None


def test_a_step_with_a_gradient_that_is_not_finite_prunes_nothing() -> None:
    model, pruning = model_of(warmup=0.0, final=0.2)
    optimizer = optimizer_of(model)
    for t in range(4):
        step(model, optimizer, t)
        pruning.after_step(t, 10)
    step(model, optimizer, 4)
    before = [(update.E.clone(), update.mask.clone()) for update in pruning.updates]
    assert pruning.updates[1].A.grad is not None
    pruning.updates[1].A.grad[0, 0] = torch.nan
    pruning.after_step(4, 10)
    for update, (diagonal, mask) in zip(pruning.updates, before, strict=True):
        assert torch.equal(update.E, diagonal) and torch.equal(update.mask, mask)


def test_a_shorter_or_longer_run_still_ends_at_the_target() -> None:
    model, pruning = model_of(warmup=0.0, final=0.5)
    optimizer = optimizer_of(model)
    ranks = []
    for t, total in enumerate([20] * 4 + [8] * 2 + [100] * 20 + [27]):
        step(model, optimizer, t)
        pruning.after_step(t, total)
        ranks.append(sum(kept(pruning)))
    assert ranks[3] > ranks[4] == ranks[5] == TARGET * LAYERS == ranks[-1] < ranks[20]


def test_files_and_copies_have_the_mask(tmp_path: Path) -> None:
    model, pruning = model_of(warmup=0.0, final=0.5)
    optimizer = optimizer_of(model)
    for t in range(10):
        step(model, optimizer, t)
        pruning.after_step(t, 10)
    save_adapter(model, tmp_path / "adapter")
    twin = copy.deepcopy(model)
    again = merge_and_unload(copy.deepcopy(model))
    base = {name: value for name, value in model.state_dict().items() if ".delta." not in name}
    again.load_state_dict(base)
    load_adapter(again, tmp_path / "adapter")
    other: Any = again.adapter_report.procedure  # type: ignore[union-attr]
    assert [update.mask.tolist() for update in other.updates] == [update.mask.tolist() for update in pruning.updates]
    assert other.ran and sum(kept(other)) == TARGET * LAYERS
    copied: Any = twin.adapter_report
    assert all(update in set(twin.modules()) for update in copied.procedure.updates)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(again(x), model(x)) and torch.equal(twin(x), model(x))


def test_the_target_is_two_thirds_of_the_rank_by_default() -> None:
    def targets(**options: Any) -> list[int]:
        return [update.target for update in model_of(target_rank=None, **options)[1].updates]

    assert (
        targets(rank=3) == [2, 2, 2] and targets(rank=1) == [1, 1, 1] and targets(rank={"2": 6, ".*": 3}) == [2, 4, 2]
    )
    assert AdaLoRA().replace(match="lora:2").target_rank is None
    values: Tensor = model_of(rank=5)[1].updates[1].A
    assert 0.012 < values.std() < 0.028
