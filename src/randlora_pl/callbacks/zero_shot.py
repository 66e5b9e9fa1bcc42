"""The test before the training: the base model, whatever the adapter starts with."""

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from randlora_pl.adapters import disabled


class ZeroShot(Callback):
    """Switches the adapter off while a test runs; methods that train the base itself have nothing to switch off."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the weights are merged."""
        task: Any = pl_module
        if not task.adapter.trains_base:
            self._stack.enter_context(disabled(task.model))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After they are restored."""
        self._stack.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the model as it was."""
        self._stack.close()
