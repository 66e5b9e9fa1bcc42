"""Checkpoints without the frozen model, for a LightningModule of your own."""

from functools import partial
from operator import attrgetter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle

from randlora_pl.adapters.base import Procedure
from randlora_pl.adapters.checkpoints import leave_out_frozen
from randlora_pl.adapters.operations import report_of, unmerge
from randlora_pl.utils.errors import UserError, errors_in, near

__all__ = ["AdapterCheckpoint"]


class AdapterCheckpoint(Callback):
    """Keep the frozen part of an adapted model out of Lightning's checkpoints.

    For a LightningModule that calls `inject` on a model of its own. Everything else stays in its checkpoints, which
    Lightning writes as before, also with several processes and FSDP2. They load strictly into a module with the same
    base model, seed and adapter, by ``ckpt_path`` and ``load_from_checkpoint``. Another base model is an error. The
    state of a method's procedure (AdaLoRA) is in them, too, if the module starts it in ``on_train_start``. From the
    start of a run, ``state_dict()`` of the LightningModule has no frozen part. The one of the adapted model is whole.

    Examples:
        >>> trainer = make_trainer(callbacks=[AdapterCheckpoint(model_attribute="model")])

    Args:
        model_attribute: Attribute of the LightningModule that holds the adapted model; dots lead to inner ones.
    """

    def __init__(self, model_attribute: str = "model") -> None:
        self.model_attribute = model_attribute
        self._hook: RemovableHandle | None = None
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
        """Leave the frozen part out of the state of the LightningModule from now on."""
        self._procedure_state, strategy = None, trainer.strategy
        if self._hook is not None:
            self._hook.remove()
        # Other strategies ask for every tensor before the hooks of PyTorch can add the frozen ones: these stay there.
        if not strategy.restore_checkpoint_after_setup or getattr(strategy, "_save_distributed_checkpoint", False):
            # no bound method: a copy of the module, as of WeightAveraging, would copy this callback
            self._hook = pl_module.register_state_dict_post_hook(  # type: ignore[no-untyped-call]
                partial(_leave_out, self.model_attribute)
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the method's procedure, and unmerge the model, as a checkpoint does.

        Raises:
            UserError: The attribute is wrong, or the model there has no adapter.
        """
        model = _find(pl_module, self.model_attribute)
        with errors_in(f"AdapterCheckpoint, {self.model_attribute} of {type(pl_module).__name__}"):
            self._procedure = report_of(model).procedure
        unmerge(model)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Give a resumed run's procedure its state, after the module has started it."""
        if self._procedure_state is not None and self._procedure is not None:
            self._procedure.load_state_dict(self._procedure_state)
            self._procedure.ran, self._procedure_state = True, None


def _find(module: nn.Module, attribute: str) -> nn.Module:
    """Return the adapted model of a LightningModule.

    Raises:
        UserError: The module has no such attribute.
    """
    try:
        model = attrgetter(attribute)(module)
    except AttributeError:
        hint = near(attribute, [name for name, _ in module.named_modules() if name])
        raise UserError(
            f"AdapterCheckpoint: {type(module).__name__} has no module {attribute!r}.{hint} Set model_attribute to the "
            "attribute with the adapted model."
        ) from None
    inner: nn.Module = getattr(model, "_orig_mod", model)  # of torch.compile
    return inner


def _leave_out(attribute: str, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave the frozen part out of the state of a LightningModule, or of a copy; hook of PyTorch."""
    model = _find(module, attribute)
    if "adapter_report" in vars(model):  # not after `merge_and_unload`
        name = next(name for name, each in module.named_modules() if each is model)
        leave_out_frozen(model, state, f"{prefix}{name}.")
