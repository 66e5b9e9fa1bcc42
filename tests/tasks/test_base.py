"""What every task does while it trains: what moves, what rests, and what the optimizer sees."""

import copy
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import Adapter, DeltaWeight, DoRA, FullFineTuning, LinearProbe, LoRA, RandLoRA
from randlora_pl.data import ImageData
from randlora_pl.tasks import AdaptationModule, LinearHeadTask, Objective, VisionLanguageTask
from randlora_pl.utils.errors import UserError
from tests.support.products import marked

from .small import CLASSES, KINDS, METHODS, TEMPLATES, EachStep, batch, built, frozen, in_run, make, trained

Fit = Callable[..., L.Trainer]


def gradients(task: Objective) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


def norm(tensors: dict[str, Tensor]) -> float:
    return float(torch.stack([value.norm() for value in tensors.values()]).norm())


# Building


@pytest.mark.parametrize(
    ("adapter", "seed"),
    [(RandLoRA(), 3), (RandLoRA(seed=5), 5), (DoRA(LoRA()), 3), (DoRA(LoRA(seed=5)), 5), (FullFineTuning(), None)],
)
def test_adapter_takes_the_seed_of_the_task_unless_it_has_its_own(adapter: Adapter, seed: int | None) -> None:
    taken = make("text head", adapter=adapter, seed=3).adapter
    assert getattr(taken, "inner", taken).seed == seed


def test_model_is_there_only_after_adapt_and_is_built_once() -> None:
    task = make("text head")
    task.set_classes(CLASSES, TEMPLATES)
    with pytest.raises(UserError, match="adapt"):
        _ = task.model
    task.adapt()
    model = task.model
    task.adapt()
    assert task.model is model
    training = [module for module in model.modules() if module.training]
    assert training and not model.training  # nothing that is frozen
    deltas = [module for module in model.modules() if isinstance(module, DeltaWeight)]
    assert all(any(module in delta.modules() for delta in deltas) for module in training)


def test_classes_come_from_somewhere(trainer: Fit, digits: Callable[..., ImageData]) -> None:
    data = digits(image_size=32)  # without a trainer it cannot ask the task
    data.setup("fit")
    with pytest.raises(UserError, match="module"):
        trainer().fit(AdaptationModule(make("text head")), data.train_dataloader())
    task = make("text head")
    task.set_classes(data.classnames, data.templates)
    trainer().fit(AdaptationModule(task), data.train_dataloader())
    assert task.run.step() == 3


def test_data_of_other_classes_are_refused(fit: Fit) -> None:
    with pytest.raises(UserError, match="10"):
        fit(built("text head"))


def test_one_class_is_refused() -> None:
    with pytest.raises(UserError, match="needs two or more"):
        make("text head").set_classes(["cat"], TEMPLATES)


def test_captions_need_the_vision_language_task() -> None:
    make("vision-language").set_classes(["a cat", "a dog"], ["{}"], captions=True)
    with pytest.raises(UserError, match="TextHeadTask"):
        make("text head").set_classes(["a cat", "a dog"], ["{}"], captions=True)


def test_bare_names_are_classes_all_the_same(trainer: Fit, digits: Callable[..., ImageData]) -> None:
    task = make("vision-language")
    figures = trainer(limit_test_batches=1).test(AdaptationModule(task), digits(templates=["{}"]), verbose=False)[0]
    assert not task.retrieval and figures.keys() == {"test/acc", "test/loss"}


def test_noise_is_trained_on_only_when_asked_for() -> None:
    with pytest.raises(UserError, match="ViT-B-32"):
        VisionLanguageTask(name="ViT-B-32")
    assert LinearHeadTask().pretrained == "timm"


@pytest.mark.parametrize("kind", ["vision-language", "text head"])
def test_a_task_in_which_nothing_trains_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match="LinearHeadTask"):
        built(kind, adapter=LinearProbe())


# What moves and what rests


OFTEN = {"vision-language": "randlora", "text head": "full", "linear head": "adalora"}


@pytest.mark.parametrize(("kind", "method"), marked(product(KINDS, METHODS), lambda row: row in OFTEN.items()))
def test_every_adapter_tensor_has_a_gradient_and_moves_and_the_rest_stays(kind: str, method: str, fit: Fit) -> None:
    """Of two factors whose product starts at zero, the second moves from the second step on: three steps."""
    task = make(kind, method, max_grad_norm=None)
    fit(task, callbacks=[looked := EachStep(gradients)])
    fresh = make(kind, method)
    fresh.set_classes(task.classnames, task.templates)
    fresh.adapt()
    start, end = trained(fresh), trained(task)
    assert start.keys() == end.keys()
    assert looked.seen[0].keys() <= looked.seen[-1].keys() == end.keys()
    for name in end:
        assert any(seen[name].any() for seen in looked.seen if name in seen), f"{name} never had a gradient"
        pruned = name.endswith(".delta.E") and not end[name].any()
        assert pruned or not torch.equal(start[name], end[name]), f"{name} did not move"
    rest, before = frozen(task), frozen(fresh)
    assert rest.keys() == before.keys()
    assert all(torch.equal(rest[name], before[name]) for name in rest)
    assert all(p.grad is None for p in task.parameters() if not p.requires_grad)


def test_full_fine_tuning_trains_everything_and_bitfit_every_bias() -> None:
    full, bias = built("vision-language", "full"), built("vision-language", "bitfit")
    names = {name for name, _ in full.model.named_parameters()}
    assert set(trained(full)) == {f"backbone.{name}" for name in names}
    assert "backbone.logit_scale" in trained(full)
    assert set(trained(bias)) == {f"backbone.{name}" for name in names if name.endswith("bias")}
    assert any(name.endswith("in_proj_bias") for name in trained(bias))


class Modes(L.Callback):
    """Which modules train, at each training batch; and whether any does in a validation."""

    def __init__(self) -> None:
        self.training: list[set[str]] = []
        self.validating: set[str] = set()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.training.append({name for name, module in pl_module.objective.model.named_modules() if module.training})

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.validating |= {name for name, module in pl_module.objective.model.named_modules() if module.training}


@pytest.mark.parametrize("method", ["randlora", "full"])
def test_frozen_parts_stay_in_eval_mode_also_after_a_validation(method: str, fit: Fit) -> None:
    task = make("vision-language", method)
    data = {"steps": 3, "batch_size": 4}
    fit(task, data, callbacks=[modes := Modes()], val_check_interval=2, limit_val_batches=1)
    if method == "full":
        expected = {name for name, _ in task.model.named_modules()}
    else:
        deltas = {name for name, module in task.model.named_modules() if isinstance(module, DeltaWeight)}
        expected = {name for name, _ in task.model.named_modules() if any(name.startswith(delta) for delta in deltas)}
    assert expected
    assert modes.training == [expected] * 3
    assert modes.validating == set()


def test_training_goes_on_from_a_merged_task_in_eval_mode(fit: Fit) -> None:
    """As `load_task` leaves it: without care its updates would get no gradient."""
    adapter = RandLoRA(rank=16, dropout=0.3)
    plain, merged = make("text head", adapter=adapter), make("text head", adapter=adapter)
    fit(plain)
    merged.set_classes(plain.classnames, plain.templates)
    merged.adapt()
    merged.eval()
    merged.prepare_evaluation()
    fit(merged)
    assert all(torch.equal(value, trained(merged)[name]) for name, value in trained(plain).items())


# The optimizer


@pytest.mark.parametrize(("kind",), marked(zip(KINDS), lambda row: row[0] != "text head"))
def test_optimizer_holds_what_trains_and_nothing_else(kind: str, fit: Fit) -> None:
    task = make(kind, "dora", weight_decay=0.2, decay_vectors=False)
    (optimizer,) = fit(task, max_steps=1).optimizers
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len({id(parameter) for parameter in held})
    assert {id(p) for p in held} == {id(p) for p in task.parameters() if p.requires_grad}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.2 if parameter.dim() > 1 else 0.0)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}


def test_steps_of_the_schedule_are_those_of_the_plan_or_of_the_trainer(fit: Fit) -> None:
    for options, total in (({}, 3), ({"max_steps": 2}, 2), ({"max_steps": 9}, 3), ({"fast_dev_run": 1}, 1)):
        trainer = fit(task := make("linear head"), {"batch_size": 4}, **options)
        assert task.run.total_steps() == trainer.global_step == total


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.full), 3])
def test_gradient_is_clipped_once_per_optimizer_step(accumulate: int, fit: Fit) -> None:
    free, clipped = make("text head", max_grad_norm=None), make("text head", max_grad_norm=1e-2)
    runs = {}
    for task in (free, clipped):
        data = {"steps": 1, "batch_size": 6}
        trainer = fit(task, data, accumulate_grad_batches=accumulate, callbacks=[looked := EachStep(gradients)])
        (runs[task],) = looked.seen
        logged = trainer.callback_metrics["train/grad_norm"].item()
        assert logged == pytest.approx(norm(runs[free]), rel=1e-4)  # that of the undivided gradient, before clipping
    assert norm(runs[free]) > 0.1
    assert norm(runs[clipped]) == pytest.approx(1e-2, rel=1e-3)
    for name, gradient in runs[free].items():  # clipping each micro-batch would have changed the direction
        torch.testing.assert_close(runs[clipped][name], gradient * (1e-2 / norm(runs[free])), rtol=1e-3, atol=1e-7)


def test_the_trainer_can_clip_by_its_own_options(fit: Fit) -> None:
    for algorithm, measure in (("norm", norm), ("value", lambda tensors: max(g.abs().max() for g in tensors.values()))):
        looked = EachStep(gradients)
        options = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
        fit(make("text head", max_grad_norm=5.0), {"steps": 1}, callbacks=[looked], **options)
        assert float(measure(looked.seen[0])) == pytest.approx(1e-3, rel=1e-3)


# Numbers


class Losses(L.Callback):
    """The logged figures of every training batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.logged_metrics.items()})


@pytest.mark.parametrize(("kind",), marked(zip(KINDS), lambda row: row[0] != "text head"))
def test_padding_counts_neither_in_the_gradient_nor_in_the_figures(kind: str, trainer: Fit, monkeypatch: Any) -> None:
    logged: list[dict[str, float]] = []
    found = []
    for labels, weight in (([0, 1, 2], [1 / 3] * 3), ([0, 1, 2, 2, 2], [1 / 3] * 3 + [0.0, 0.0])):
        task = built(kind)
        module = in_run(task, trainer())
        figures: dict[str, float] = {}
        monkeypatch.setattr(
            module, "log", lambda name, value, figures=figures, **_: figures.update({name: float(value)})
        )
        part = batch(labels, weight) | {"step_counts": torch.tensor([1, 1, 1])}
        loss = module.training_step(part, 0)
        loss.backward()
        module.log_step()
        found.append((loss.detach(), gradients(task)))
        logged.append(figures)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)
    assert logged[0]["train/loss"] == pytest.approx(float(found[0][0]), rel=1e-5)


@pytest.mark.parametrize(("kind",), marked(zip(KINDS), lambda row: row[0] in ("vision-language",)))
def test_bf16_mixed_training_follows_float32(kind: str, fit: Fit) -> None:
    tasks = {precision: make(kind) for precision in ("32-true", "bf16-mixed")}
    losses = {precision: Losses() for precision in tasks}
    for precision, task in tasks.items():
        fit(task, {"batch_size": 16}, callbacks=[losses[precision]], precision=precision, log_every_n_steps=1)
    exact, rounded = (trained(task) for task in tasks.values())
    assert all(value.dtype == torch.float32 for value in rounded.values())
    assert not torch.equal(next(iter(exact.values())), next(iter(rounded.values())))
    for before, after in zip(losses["32-true"].seen[1:], losses["bf16-mixed"].seen[1:], strict=True):
        assert after["train/loss"] == pytest.approx(before["train/loss"], rel=0.02)


@pytest.mark.parametrize(
    ("kind", "method"),
    marked(product(KINDS, ["randlora", "lora", "full"]), lambda row: row == ("vision-language", "randlora")),
)
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, method: str) -> None:
    found = []
    for switch in (False, True):
        task = built(kind, method, gradient_checkpointing=switch)
        calls: list[nn.Module] = []
        for module in task.model.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.register_forward_hook(lambda module, *_, calls=calls: calls.append(module))
        losses, _ = task.sample_losses(batch([0, 1, 2, 3, 1]))
        forward = len(calls)
        losses.mean().backward()
        found.append((losses.detach(), gradients(task)))
        assert len(calls) == (2 * forward if switch else forward)  # it did recompute
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_dropout_of_a_batch_is_a_function_of_seed_and_position(fit: Fit) -> None:
    """So that the state of the global generator, which other code moves, does not matter."""
    ends = []
    for seed, disturb in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturb)
        task = make("text head", adapter=RandLoRA(rank=8, dropout=0.3, seed=9), seed=seed)
        fit(task, {"batch_size": 4})
        ends.append(next(iter(trained(task).values())))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_each_batch_of_each_rank_drops_other_entries() -> None:
    seeds = set()
    with torch.random.fork_rng(devices=[]):
        for number, rank in product(range(3), range(2)):
            trainer = SimpleNamespace(world_size=2, global_rank=rank)
            module: Any = SimpleNamespace(objective=SimpleNamespace(seed=0), _draws=True, trainer=trainer)
            AdaptationModule.on_train_batch_start(module, {}, number)
            seeds.add(torch.initial_seed())
    assert len(seeds) == 6


def test_a_built_task_can_be_copied_and_trained_on(fit: Fit) -> None:
    task = make("vision-language")
    fit(task, {"steps": 1})
    twin = copy.deepcopy(task)
    before = trained(task)
    fit(twin)
    assert all(torch.equal(value, before[name]) for name, value in trained(task).items())
    assert any(not torch.equal(value, before[name]) for name, value in trained(twin).items())
