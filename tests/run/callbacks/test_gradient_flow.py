import logging

import pytest
import torch

from randlora_pl.adapters import RandLoRA
from randlora_pl.run.callbacks import GradientFlow
from randlora_pl.tasks import TextHeadTask
from randlora_pl.utils.errors import UserError
from tests.run.callbacks.conftest import Fit


class Deaf(TextHeadTask):
    """Declares a tensor trainable that plays no part in the loss."""

    def configure_model(self) -> None:
        super().configure_model()
        if not hasattr(self, "unused"):
            self.unused = torch.nn.Parameter(torch.ones(3))


def test_healthy_adapters_are_not_complained_about(fit: Fit, caplog: pytest.LogCaptureFixture) -> None:
    callback = GradientFlow(action="raise")
    fit(callback)
    assert callback.silent == []
    assert callback._steps == 2


def test_silent_tensors_are_named(fit: Fit) -> None:
    callback = GradientFlow()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("randlora_pl")
    logger.addHandler(handler)
    try:
        fit(callback, task=Deaf("tiny", "random", adapter=RandLoRA(rank=16)))
    finally:
        logger.removeHandler(handler)
    assert callback.silent == ["unused"]
    assert any("1 of" in text and "unused" in text for text in messages)


def test_silent_tensors_stop_the_run_on_request(fit: Fit) -> None:
    with pytest.raises(UserError, match="unused"):
        fit(GradientFlow(action="raise"), task=Deaf("tiny", "random", adapter=RandLoRA(rank=16)))
    fit(GradientFlow(action="off"), task=Deaf("tiny", "random", adapter=RandLoRA(rank=16)))


def test_impossible_action() -> None:
    with pytest.raises(UserError, match="raise"):
        GradientFlow(action="shout")  # type: ignore[arg-type]
