"""Checkpoints without the frozen model, for a LightningModule of your own.

Examples:
    >>> from lightning import Trainer
    >>> from randlora_pl.callbacks import AdapterCheckpoint
    >>> trainer = Trainer(callbacks=[AdapterCheckpoint("model")], logger=False, accelerator="cpu")
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch import nn

from randlora_pl.adapters.base import Procedure
from randlora_pl.adapters.checkpoints import MARK, complete_state, leave_out_frozen
from randlora_pl.adapters.operations import adapted_layers, report_of
from randlora_pl.utils.errors import UserError, errors_in, near

__all__ = ["AdapterCheckpoint"]


class AdapterCheckpoint(Callback):
    """Keep the frozen part of an adapted model out of Lightning's checkpoints.

    For a LightningModule that calls `inject` on a model of its own. Everything else stays in its checkpoints, which
    Lightning writes as before, also with several processes and FSDP2. They load strictly into a module with the same
    base model, seed and adapter, by ``ckpt_path`` and ``load_from_checkpoint``. Another base model is refused. The
    state of a method's procedure (AdaLoRA) is in them, too, if the module starts it in ``on_train_start``.

    Examples:
        >>> callback = AdapterCheckpoint(model_attribute="model")
        >>> callback.model_attribute
        'model'

    Args:
        model_attribute: Attribute of the LightningModule that holds the adapted model; dots lead to inner ones.
    """

    def __init__(self, model_attribute: str = "model") -> None:
        self.model_attribute = model_attribute
        self._strategy: Strategy | None = None  # whose methods are wrapped
        self._procedure: Procedure | None = None
        self._procedure_state: dict[str, Any] | None = None  # of a checkpoint, until the training starts

    @property
    def state_key(self) -> str:
        """Name of its state in checkpoints, one for each attribute."""
        return self._generate_state_key(model_attribute=self.model_attribute)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the method's procedure."""
        state, procedure = self._procedure_state, self._procedure
        if state is None and procedure is not None and procedure.ran:
            state = procedure.state_dict()
        return {} if state is None else {"procedure": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of the procedure for `on_train_batch_start`."""
        self._procedure_state = state_dict.get("procedure")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap what the strategy reads from the module, writes and loads; callbacks do not see each of these."""
        self._procedure_state, strategy = None, trainer.strategy
        if strategy is self._strategy:
            return
        self._strategy, read = strategy, strategy.lightning_module_state_dict
        save, load = strategy.save_checkpoint, strategy.load_checkpoint

        @wraps(read)
        def lightning_module_state_dict() -> dict[str, Any]:
            with self._left_out(strategy):
                return read()

        @wraps(save)
        def save_checkpoint(checkpoint: dict[str, Any], *args: Any, **options: Any) -> None:
            _, model, prefix = self._find(strategy)
            state = checkpoint["state_dict"]  # empty in processes that write nothing
            if state and prefix + MARK not in state:  # the mean of Lightning's WeightAveraging
                leave_out_frozen(model, state, prefix)
            save(checkpoint, *args, **options)

        @wraps(load)
        def load_checkpoint(checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
            module, path = self._find(strategy)[0], Path(strategy.broadcast(checkpoint_path))
            strict = module.strict_loading
            with self._left_out(strategy):
                if strategy.restore_checkpoint_after_setup and path.is_file():
                    self._check_file(strategy, path, weights_only)
                    module.strict_loading = False  # FSDP2 asks for frozen tensors before the hooks of PyTorch act
                try:
                    return load(checkpoint_path, weights_only=weights_only)
                finally:
                    module.strict_loading = strict

        for wrapped in (lightning_module_state_dict, save_checkpoint, load_checkpoint):
            setattr(strategy, wrapped.__name__, wrapped)

    def _find(self, strategy: Strategy) -> tuple[LightningModule, nn.Module, str]:
        """Return the LightningModule, the adapted model, and the prefix of its names in the module's state.

        Raises:
            UserError: The module has no such attribute, or the model there has no adapter.
        """
        module = strategy.lightning_module
        assert module is not None
        try:
            model = attrgetter(self.model_attribute)(module)
        except AttributeError:
            hint = near(self.model_attribute, [name for name, _ in module.named_modules() if name])
            raise UserError(
                f"AdapterCheckpoint: {type(module).__name__} has no module {self.model_attribute!r}.{hint} Set "
                "model_attribute to the attribute with the adapted model."
            ) from None
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        with errors_in(f"AdapterCheckpoint, {self.model_attribute} of {type(module).__name__}"):
            self._procedure = report_of(model).procedure
        return module, model, next(f"{name}." for name, each in module.named_modules() if each is model)

    @contextmanager
    def _left_out(self, strategy: Strategy) -> Iterator[None]:
        """Leave the frozen part out of the state dict of the LightningModule inside the block."""
        module, model, prefix = self._find(strategy)

        def leave_out(_module: nn.Module, state: dict[str, Any], *_: Any) -> None:
            leave_out_frozen(model, state, prefix)

        with module.register_state_dict_post_hook(leave_out):  # type: ignore[no-untyped-call]
            yield

    def _check_file(self, strategy: Strategy, path: Path, weights_only: bool | None) -> None:
        """Refuse a checkpoint in one file that lacks a tensor or belongs to another base model."""
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)["state_dict"]
        module, model, prefix = self._find(strategy)
        complete_state(model, state, prefix)
        if missing := sorted(module.state_dict().keys() - state.keys() - {prefix + MARK}):
            raise UserError(f"{path} does not fit: missing {missing[:3]}.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model that cannot train with an adapter.

        Raises:
            UserError: The attribute is wrong, or the model there has no adapter or is merged.
        """
        _, model, _ = self._find(trainer.strategy)
        if any(layer.merged for layer in adapted_layers(model).values()):
            raise UserError(
                f"AdapterCheckpoint: {self.model_attribute} of {type(pl_module).__name__} is merged, so its update "
                "cannot train. Call unmerge(model) first."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Give a resumed run's procedure its state, after the module has started it."""
        if self._procedure_state is not None and self._procedure is not None:
            self._procedure.load_state_dict(self._procedure_state)
            self._procedure.ran, self._procedure_state = True, None
