import pytest
import torch

from randlora_pl.run.callbacks import ZeroShot
from tests.run.callbacks.conftest import Fit
from tests.tasks.small import shake


def test_adapter_is_off_during_the_test_and_on_again_after(fit: Fit) -> None:
    trainer, task, data = fit()
    trained = trainer.test(task, data, verbose=False)[0]
    shake(task, 2.0)
    shaken = trainer.test(task, data, verbose=False)[0]
    before = {name: value.clone() for name, value in task.state_dict().items()}
    trainer.callbacks.append(ZeroShot())  # type: ignore[attr-defined]
    plain = trainer.test(task, data, verbose=False)[0]
    trainer.callbacks.pop()  # type: ignore[attr-defined]
    assert plain != shaken and plain != trained
    assert trainer.test(task, data, verbose=False)[0] == shaken
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items() if "metrics" not in name)
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert trainer.test(task, data, verbose=False)[0]["test/loss"] == pytest.approx(plain["test/loss"], abs=1e-5)
