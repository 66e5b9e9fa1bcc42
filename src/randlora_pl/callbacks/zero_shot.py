"""Test of the base model before the training."""

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from randlora_pl.adapters import disabled


class ZeroShot(Callback):
    """Disable the adapter during a test; methods that train the base weights have nothing to disable."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Disable the adapter before weights are merged."""
        if not pl_module.adapter.trains_base:
            self._stack.enter_context(disabled(pl_module.model))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enable the adapter after weights are restored."""
        self._stack.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the model."""
        self._stack.close()
