"""How a task runs: frozen weights in bfloat16, compiled blocks, the fused optimizer."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from randlora_pl.adapters import Frozen, RandLoRA, random_bases
from randlora_pl.data import ImageData
from randlora_pl.tasks import AdaptationModule, load_task
from randlora_pl.tasks.run import Run
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item, marked

from .small import KINDS, EachStep, built, images, in_run, make, trained

Make = Callable[..., Any]
BF16 = {"precision": "bf16-mixed"}


def run(task: Any, trainer: Make, digits: Make, **options: Any) -> Any:
    made: L.Trainer = trainer(**{"limit_test_batches": 2} | options)
    data: ImageData = digits(batch_size=16)
    made.fit(AdaptationModule(task), data)
    return made.test(AdaptationModule(task), data, verbose=False)[0]


@pytest.mark.parametrize(("kind",), marked(zip(KINDS), lambda row: row[0] in ("vision-language",)))
def test_frozen_bfloat16_weights_train_as_autocast_does(kind: str, trainer: Make, digits: Make, tmp_path: Path) -> None:
    plain, half = make(kind), make(kind, frozen_dtype="bfloat16")
    figures = [run(task, trainer, digits, **BF16) for task in (plain, half)]
    assert figures[1]["test/loss"] == pytest.approx(figures[0]["test/loss"], rel=0.02)
    assert plain.report.base_hash == half.report.base_hash
    for name, value in trained(half).items():
        assert value.dtype == torch.float32
        assert (value - trained(plain)[name]).norm() <= 0.2 * value.norm() + 1e-3, name
    kinds = {p.dtype for p in half.model.parameters() if not p.requires_grad}
    assert kinds == {torch.bfloat16, torch.float32}
    assert {p.dtype for p in plain.model.parameters()} == {torch.float32}
    # The adapter goes on elsewhere, with frozen weights of float32.
    there = load_task(half.save(tmp_path / "adapter"))
    assert {p.dtype for p in there.model.parameters()} == {torch.float32}
    with torch.no_grad():
        logits = there.class_logits(images(2))
    assert logits.dtype == torch.float32 and logits.isfinite().all()


@in_one_item(
    ("precision", "options", "says"),
    [
        ("bf16-true", {}, "Use bf16-mixed"),
        ("32-true", {"frozen_dtype": "bfloat16"}, "bf16-mixed, not 32-true"),
        ("32-true", {"torch_compile": "induktor"}, "Did you mean 'inductor'"),
        ("32-true", {"torch_compile": "max-autotun"}, "Did you mean 'max-autotune'"),
    ],
)
def test_what_cannot_run_is_refused(
    precision: str, options: dict[str, Any], says: str, trainer: Make, digits: Make
) -> None:
    with pytest.raises(UserError, match=says):
        trainer(precision=precision).fit(AdaptationModule(make("text head", **options)), digits())
    with pytest.raises(UserError, match="bfloat16"):
        make("text head", frozen_dtype="float16")


@in_one_item(
    ("precision", "method", "dtype"),
    [
        ("bf16-mixed", "randlora", torch.bfloat16),
        ("bf16-mixed", "bitfit", torch.float32),
        ("32-true", "randlora", torch.float32),
        ("16-mixed", "randlora", torch.float32),
        (None, "randlora", torch.float32),
    ],
)
def test_auto_casts_frozen_matrices_where_products_are_in_bfloat16(
    precision: str | None, method: str, dtype: torch.dtype
) -> None:
    task = make("linear head", method, frozen_dtype="auto")
    task.run = Run(precision=precision)
    task.set_classes(["a", "b"], ["{}"])
    task.adapt()
    matrices = {p.dtype for n, p in task.model.named_parameters() if p.dim() == 2 and n.endswith("fc.weight")}
    assert matrices == {dtype}
    assert {p.dtype for p in task.parameters() if p.requires_grad} == {torch.float32}
    task.adapter = Frozen()  # nothing trains
    assert task.chosen_dtype() == ("bfloat16" if precision == "bf16-mixed" else "float32")


def test_options_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="FullFineTuning"):
        built("text head", "full", frozen_dtype="bfloat16")
    with pytest.raises(UserError, match="build"):
        built("text head", adapter=RandLoRA(rank=8, memory="low"), torch_compile="aot_eager")
    with pytest.raises(UserError, match="max_grad_norm"):
        make("text head", max_grad_norm=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("kind",), marked(zip(KINDS), lambda row: row[0] in ("linear head",)))
def test_compiled_training_ends_with_the_same_weights(kind: str, trainer: Make, digits: Make) -> None:
    torch.compiler.reset()
    tasks = [make(kind, torch_compile=switch) for switch in (False, "aot_eager")]
    figures = [run(task, trainer, digits) for task in tasks]
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)
    compiled: Any = [module for module in tasks[1].model.modules() if module._compiled_call_impl is not None]
    assert len(compiled) == (4 if kind == "vision-language" else 2)
    for name, value in trained(tasks[0]).items():
        torch.testing.assert_close(trained(tasks[1])[name], value, rtol=1e-3, atol=1e-5)


def test_true_and_modes_compile_by_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("torch.nn.Module.compile", lambda _, **options: seen.append(options))
    built("text head", torch_compile=True)
    built("text head", torch_compile="max-autotune")
    built("text head", torch_compile="aot_eager")
    ways = ("inductor", "default"), ("inductor", "max-autotune"), ("aot_eager", None)
    assert seen == [{"backend": backend, "mode": mode} for backend, mode in ways for _ in range(2)]


def test_gradients_of_cuda_graphs_stay_in_memory_of_their_own(
    trainer: Make, digits: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.Module.compile", lambda *_, **options: None)
    addresses, figures = [], []
    for switch in ("default", "reduce-overhead"):
        task = make("text head", torch_compile=switch)
        look = EachStep(lambda task: [p.grad.data_ptr() for p in task.parameters() if p.requires_grad])
        figures.append(run(task, trainer, digits, callbacks=[look], accumulate_grad_batches=2))
        addresses.append(look.seen)
    assert figures[1] == figures[0]
    assert len(addresses[1]) > 1 and all(seen == addresses[1][0] for seen in addresses[1])


@pytest.mark.slow
def test_inductor_trains_to_the_same_weights(trainer: Make, digits: Make) -> None:
    pytest.importorskip("torch._inductor")
    tasks = [make("vision-language", torch_compile=switch) for switch in (False, True)]
    figures = [run(task, trainer, digits) for task in tasks]
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)


def optimizer_of(task: Any, trainer: Make, digits: Make, **options: Any) -> torch.optim.Optimizer:
    made = trainer(**options)
    made.fit(AdaptationModule(task), digits())
    found: torch.optim.Optimizer = made.optimizers[0]
    return found


def test_the_optimizer_is_fused_unless_gradients_are_scaled(trainer: Make, digits: Make) -> None:
    assert optimizer_of(make("text head"), trainer, digits, max_steps=1).defaults["fused"] is True
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    assert optimizer_of(make("text head"), trainer, digits, plugins=plugins, max_steps=1).defaults["fused"] is False
    module = in_run(built("text head"), trainer())
    module._device = torch.device("meta")
    made: Any = module.configure_optimizers()
    assert made["optimizer"].defaults | {"fused": False, "betas": (0.9, 0.999)} == made["optimizer"].defaults


def test_bases_are_drawn_on_the_gpu_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[torch.device | None] = []
    monkeypatch.setattr(
        random_bases, "_faster", SimpleNamespace(set=devices.append, reset=lambda _: None, get=lambda: None)
    )
    for name in ("cuda", "cpu", None):
        task = make("linear head", adapter=RandLoRA(rank=2))
        if name is not None:
            task.run = Run(device=torch.device(name))
        task.set_classes(["a", "b"], ["{}"])
        task.adapt()
    assert devices == [torch.device("cuda"), None, None]
