"""The rank of updates over training steps."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from randlora_pl.adapters import FullFineTuning, HydraLoRA, LinearProbe, LoRA, RandLoRA
from randlora_pl.adapters.operations import delta_weights
from randlora_pl.adapters.spectrum import spectrum
from randlora_pl.run.callbacks import UpdateSpectrum
from randlora_pl.tasks import LinearHeadTask, TextHeadTask
from randlora_pl.utils.errors import UserError
from tests.run.callbacks.conftest import Fit


def test_means_over_layers_at_every_so_many_steps(fit: Fit, tmp_path: Path) -> None:
    callback = UpdateSpectrum(every_n_steps=2)
    task = TextHeadTask("tiny", "random", adapter=LoRA(rank=3, alpha=8))
    _, task, _ = fit(callback, task=task, logger=CSVLogger(tmp_path, "", "csv"), log_every_n_steps=50)
    assert callback.history["steps"] == [2, 4]
    last = [spectrum(update) for update in delta_weights(task.model).values()]
    assert len(last) == 6
    for name in ("rank", "stable_rank", "effective_rank", "norm"):
        mean = sum(float(getattr(one, name)) for one in last) / 6
        assert callback.history[name][-1] == pytest.approx(mean, abs=1e-3)
    assert callback.history["rank"] == [3, 3]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["spectrum/steps"] == [2, 4] and results["spectrum/rank"] == [3, 3]
    lines = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    assert "spectrum/effective_rank" in lines[0] and len(lines) == 3


def test_the_last_step_has_a_spectrum(fit: Fit) -> None:
    callback = UpdateSpectrum(every_n_steps=3)
    fit(callback)
    assert callback.history["steps"] == [3, 4]


def test_full_rank_methods(fit: Fit) -> None:
    for adapter in (RandLoRA(rank=16), FullFineTuning()):
        callback = UpdateSpectrum(every_n_steps=4)
        rate = 0.01 if isinstance(adapter, RandLoRA) else 1e-3
        fit(callback, task=TextHeadTask("tiny", "random", adapter=adapter, learning_rate=rate))
        assert callback.history["steps"] == [4]
        assert callback.history["rank"][0] > 150  # of 192
        assert 1 <= callback.history["stable_rank"][0] <= callback.history["rank"][0]


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


def test_a_resumed_run_goes_on(fit: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = UpdateSpectrum(every_n_steps=2)
    trainer, task, _ = fit(callback, max_steps=2)
    assert callback.history["steps"] == [2]
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    state = callback.state_dict()

    def resumed(history: dict[str, Any]) -> UpdateSpectrum:
        again = UpdateSpectrum(every_n_steps=2)
        again.load_state_dict(history)
        again.on_train_start(trainer, task)
        return again

    assert resumed(state).history == callback.history
    # a checkpoint from before the spectrum of its own step
    late = resumed({"history": {name: [] for name in callback.history}})
    assert late.history["steps"] == [2] and late.history["rank"] == callback.history["rank"]


def test_a_resumed_full_fine_tuning_says_that_it_cannot(fit: Fit) -> None:
    trainer, task, _ = fit(UpdateSpectrum(), task=TextHeadTask("tiny", "random", adapter=FullFineTuning()))
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("randlora_pl").addHandler(handler)
    try:
        callback = UpdateSpectrum(every_n_steps=2)
        callback.on_train_start(trainer, task)
    finally:
        logging.getLogger("randlora_pl").removeHandler(handler)
    assert callback.history["steps"] == [] and "does not have the weights" in messages[0]


def test_impossible_steps() -> None:
    with pytest.raises(UserError, match="Set 0 or a positive whole number"):
        UpdateSpectrum(every_n_steps=-1)
    task = TextHeadTask("tiny", "random", adapter=HydraLoRA())
    UpdateSpectrum().setup(Trainer(logger=False), task, "fit")
    with pytest.raises(UserError, match=r"the update of HydraLoRA depends on the input.* Remove the option"):
        UpdateSpectrum(every_n_steps=2).setup(Trainer(logger=False), task, "test")  # before the training


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
