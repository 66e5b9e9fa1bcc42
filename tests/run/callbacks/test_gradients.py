"""What is measured in steps: gradients that are missing, their share that LoRA cannot see, and ranks of updates."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from randlora_pl.adapters import Adapter, FullFineTuning, HydraLoRA, LinearProbe, LoRA, RandLoRA, Together, inject
from randlora_pl.adapters.derived import spectrum
from randlora_pl.adapters.layers import AdaptedLayer
from randlora_pl.adapters.methods.lora import LoRADelta
from randlora_pl.adapters.operations import delta_weights
from randlora_pl.run.callbacks import GradientFlow, UnseenGradient, UpdateSpectrum
from randlora_pl.run.callbacks.gradients import layers_of
from randlora_pl.tasks import AdaptationModule, LinearHeadTask, TextHeadTask
from randlora_pl.utils.errors import UserError
from tests.run.callbacks.conftest import Fit
from tests.support.products import in_one_item
from tests.tasks.small import built, shake, trained

ADAPTERS: dict[str, Callable[[], Adapter]] = {
    "packed": lambda: LoRA(rank=3, alpha=8),
    "split": lambda: LoRA(rank=3, alpha=8, qkv="split"),
    "together": lambda: Together([RandLoRA(rank=16), LoRA(rank=3, alpha=8)]),
}


def unseen(gradient: Tensor, lora: LoRADelta) -> tuple[float, float, float]:
    """The squared norms by whole projection matrices, in float64."""
    gradient, b, a = gradient.double(), lora.B.detach().double(), lora.A.detach().double()
    out, into = (torch.eye(side, dtype=torch.float64) for side in gradient.shape)
    rest = (out - b @ torch.linalg.pinv(b)) @ gradient @ (into - torch.linalg.pinv(a) @ a)
    ranks = [int(torch.linalg.matrix_rank(each)) for each in (b, a)]
    chance = math.prod(1 - rank / side for rank, side in zip(ranks, gradient.shape, strict=True))
    return float(rest.square().sum()), chance * float(gradient.square().sum()), float(gradient.square().sum())


@in_one_item(
    ("name", "moved", "checkpointing"),
    [("packed", True, False), ("split", True, True), ("packed", False, False), ("together", True, False)],
)
def test_equals_projections_of_the_weights_own_gradient(name: str, moved: bool, checkpointing: bool) -> None:
    torch.manual_seed(0)
    task = built("vision-language", adapter=ADAPTERS[name](), gradient_checkpointing=checkpointing)
    if moved:
        shake(task)
    model, images = task.model, torch.randn(4, 3, 32, 32)

    def loss() -> Tensor:
        features: Any = model.encode_image(images), model.encode_text(task.tokenizer(["a b", "c", "d", "e f"]))  # type: ignore
        value: Tensor = (features[0] * features[1]).sum() + features[0].square().sum()
        return value

    task.train()
    callback = UnseenGradient()
    callback._layers = layers_of(model)
    loss().backward()
    layers = callback._stop()
    found = {id(layer.update): (layer.unseen, layer.random, layer.whole) for layer in layers}
    loras = {id(layer.update): layer.lora for layer in layers}
    for layer in layers:
        assert "add" not in vars(layer.update) and "contribution" not in vars(layer.update)
    adapted = [layer for layer in model.modules() if isinstance(layer, AdaptedLayer) and layer.delta is not None]
    for each in adapted:
        each.adapted_weight.requires_grad_(True)
    loss().backward()
    for each in adapted:
        blocks: Any = each.delta.blocks() if name == "split" and hasattr(each.delta, "blocks") else {"": each.delta}
        for block, update in blocks.items():
            rows = slice(*each.delta.rows[block]) if block else slice(None)  # type: ignore[union-attr]
            expected = unseen(each.adapted_weight.grad[rows], loras[id(update)])  # type: ignore[index]
            assert found.pop(id(update)) == pytest.approx(expected, rel=1e-4)
    assert not found


def test_a_run_logs_it_with_the_same_bits(fit: Fit, tmp_path: Path) -> None:
    def run(callback: UnseenGradient, adapter: Adapter | None = None, **options: Any) -> Any:
        adapter = adapter or LoRA(rank=3, alpha=8, dropout=0.2)
        return fit(callback, task=TextHeadTask("tiny", "random", adapter=adapter), accumulate_grad_batches=2, **options)

    callback = UnseenGradient(every_n_steps=3)
    _, task, _ = run(callback)
    assert callback.history["steps"] == [3, 4]
    shares, relative = callback.history["share"], callback.history["relative"]
    assert all(0 < share < other <= 1.5 for share, other in zip(shares, relative, strict=True))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["unseen_gradient/steps"] == [3, 4] and results["unseen_gradient/share"] == shares
    (tmp_path / "results.json").unlink()
    off = UnseenGradient()
    _, without, _ = run(off)
    assert off.history["steps"] == [] and not (tmp_path / "results.json").exists()
    first, second = trained(task), trained(without)
    assert all(torch.equal(first[name], second[name]) for name in first)
    trainer: Any = SimpleNamespace(global_step=0, loggers=[])
    for lora, found in ((LoRA(rank=8), [0]), (LoRA(rank=2), [])):  # all directions are LoRA's; not a number
        inject(layer := torch.nn.Sequential(torch.nn.Linear(8, 8)), lora, ["0"])
        layer[0].delta.B.data += torch.eye(8, layer[0].delta.B.shape[1]) * (float("nan") if not found else 1)
        whole = UnseenGradient(every_n_steps=1)
        whole._layers = layers_of(layer)
        layer(torch.randn(3, 8)).sum().backward()
        whole.on_after_backward(trainer, task)
        assert whole.history["relative"] == whole.history["share"] == found
    again = UnseenGradient(every_n_steps=3)
    again.load_state_dict(callback.state_dict())
    assert again.history == callback.history
    update = SimpleNamespace(add=None, contribution=None)
    again._layers = [SimpleNamespace(unseen=0.0, random=0.0, whole=2.0, update=update)]  # type: ignore[list-item]
    again.on_after_backward(SimpleNamespace(global_step=4, loggers=[]), task)  # type: ignore[arg-type]
    assert again.history["relative"][-1] == 0  # a LoRA of full rank

    for options, message in (
        ({"adapter": RandLoRA(rank=16)}, "RandLoRA has none. Remove the option, or set --model.adapter LoRA"),
        ({"callback": -1}, "every_n_steps is -1"),
    ):
        with pytest.raises(UserError, match=message):
            run(UnseenGradient(every_n_steps=options.get("callback", 3)), options.get("adapter"))  # type: ignore[arg-type]
    compiled = TextHeadTask("tiny", "random", adapter=LoRA(rank=3), torch_compile=True)
    with pytest.raises(UserError, match=r"compiled blocks. Remove --model.torch_compile"):
        fit(UnseenGradient(every_n_steps=1), task=compiled)


class Deaf(TextHeadTask):
    """Declares a tensor trainable that plays no part in the loss."""

    def adapt(self) -> None:
        super().adapt()
        if not hasattr(self, "unused"):
            self.unused = torch.nn.Parameter(torch.ones(3))


def test_healthy_adapters_are_not_complained_about(fit: Fit) -> None:
    callback = GradientFlow(action="raise")
    fit(callback)
    assert callback.silent == [] and callback._steps == 2


def test_silent_tensors_are_named_and_stop_the_run_on_request(
    fit: Fit, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(callback: GradientFlow) -> GradientFlow:
        fit(callback, task=Deaf("tiny", "random", adapter=RandLoRA(rank=16)))
        return callback

    monkeypatch.setattr(logging.getLogger("randlora_pl"), "propagate", True)
    assert run(GradientFlow()).silent == ["unused"]
    assert any("1 of" in text and "unused" in text for text in caplog.messages)
    with pytest.raises(UserError, match="unused"):
        run(GradientFlow(action="raise"))
    run(GradientFlow(action="off"))
    with pytest.raises(UserError, match="raise"):
        GradientFlow(action="shout")  # type: ignore[arg-type]


def test_means_over_layers_at_every_so_many_steps_and_the_last(fit: Fit, tmp_path: Path) -> None:
    callback = UpdateSpectrum(every_n_steps=3)
    task = TextHeadTask("tiny", "random", adapter=LoRA(rank=3, alpha=8))
    _, task, _ = fit(callback, task=task, logger=CSVLogger(tmp_path, "", "csv"), log_every_n_steps=50)
    last = [spectrum(update) for update in delta_weights(task.model).values()]
    assert len(last) == 6
    for name in ("rank", "stable_rank", "effective_rank", "norm"):
        mean = sum(float(getattr(one, name)) for one in last) / 6
        assert callback.history[name][-1] == pytest.approx(mean, abs=1e-3)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["spectrum/steps"] == callback.history["steps"] == [3, 4]
    assert results["spectrum/rank"] == callback.history["rank"] == [3, 3]
    lines = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    assert "spectrum/effective_rank" in lines[0] and len(lines) == 3


def test_off_by_default_and_nothing_without_updates(fit: Fit, tmp_path: Path) -> None:
    callback = UpdateSpectrum()
    fit(callback)
    assert callback.history["steps"] == [] and not (tmp_path / "results.json").exists()
    callback = UpdateSpectrum(every_n_steps=1)
    fit(callback, task=LinearHeadTask("tiny", "random", adapter=LinearProbe()))
    assert callback.history["steps"] == []


def test_weights_that_are_not_finite_have_no_spectrum(fit: Fit) -> None:
    class Breaks(UpdateSpectrum):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            with torch.no_grad():
                next(p for p in pl_module.parameters() if p.requires_grad).fill_(float("nan"))
            super().on_train_batch_end(trainer, pl_module, *args)

    callback = Breaks(every_n_steps=1)
    fit(callback)
    assert callback.history["steps"] == []


def test_a_resumed_run_goes_on(fit: Fit, tmp_path: Path) -> None:
    callback = UpdateSpectrum(every_n_steps=2)
    trainer, task, _ = fit(callback, max_steps=2)
    assert callback.history["steps"] == [2]
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    state = callback.state_dict()

    def resumed(history: dict[str, Any]) -> UpdateSpectrum:
        again = UpdateSpectrum(every_n_steps=2)
        again.load_state_dict(history)
        again.on_train_start(trainer, AdaptationModule(task))
        return again

    assert resumed(state).history == callback.history
    # a checkpoint from before the spectrum of its own step
    late = resumed({"history": {name: [] for name in callback.history}})
    assert late.history["steps"] == [2] and late.history["rank"] == callback.history["rank"]


def test_a_resumed_full_fine_tuning_says_that_it_cannot(
    fit: Fit, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, task, _ = fit(UpdateSpectrum(), task=TextHeadTask("tiny", "random", adapter=FullFineTuning()))
    callback = UpdateSpectrum(every_n_steps=2)
    monkeypatch.setattr(logging.getLogger("randlora_pl"), "propagate", True)
    callback.on_train_start(trainer, AdaptationModule(task))
    assert callback.history["steps"] == [] and any("does not have the weights" in text for text in caplog.messages)


def test_impossible_steps() -> None:
    with pytest.raises(UserError, match="Set 0 or a positive whole number"):
        UpdateSpectrum(every_n_steps=-1)
    task = TextHeadTask("tiny", "random", adapter=HydraLoRA())
    module = AdaptationModule(task)
    UpdateSpectrum().setup(Trainer(logger=False), module, "fit")
    with pytest.raises(UserError, match=r"the update of HydraLoRA depends on the input.* Remove the option"):
        UpdateSpectrum(every_n_steps=2).setup(Trainer(logger=False), module, "test")  # before the training


def test_full_fine_tuning_of_conv1d_is_seen(tmp_path: Path) -> None:
    """GPT-2's linear layers are transformers' Conv1D."""
    pytest.importorskip("transformers", reason="pip install '.[language]'")
    from tests.language.small import fit as train
    from tests.language.small import make, texts, write_toy

    callback = UpdateSpectrum(every_n_steps=1)
    task = make("bytes", "gpt2", adapter=FullFineTuning(), overrides={"vocab_size": 260})
    data = texts(write_toy(tmp_path), steps=1)
    train(task, data, callbacks=[callback], default_root_dir=tmp_path)
    assert len(callback._start) >= 8 and callback._start["transformer.h.0.mlp.c_fc"].shape == (192, 48)
    assert callback.history["steps"] == [1] and callback.history["rank"][0] > 8
