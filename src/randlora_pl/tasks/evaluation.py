"""How every task evaluates: on merged weights."""

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from randlora_pl.adapters import merge, unmerge
from randlora_pl.utils.errors import UserError


class EvaluatedModule(LightningModule):
    """Validation and test of a model with an adapter.

    Attributes:
        test_name: Prefix of the figures of a test, ``test`` or, before training, ``zeroshot``.
        metrics: The running figures.
    """

    def __init__(self) -> None:
        super().__init__()
        self.test_name = "test"
        self.metrics = nn.ModuleDict()

    @property
    def model(self) -> nn.Module:
        """The backbone with its adapter."""
        raise NotImplementedError

    def prepare_evaluation(self) -> None:
        """Merges the adapter; subclasses prepare what all batches share."""
        merge(self.model)

    def finish_evaluation(self) -> None:
        """Restores the frozen weights."""
        unmerge(self.model)

    def on_validation_epoch_start(self) -> None:
        """Prepares the evaluation."""
        self.prepare_evaluation()

    def on_test_epoch_start(self) -> None:
        """Prepares the evaluation."""
        self.prepare_evaluation()

    def on_predict_epoch_start(self) -> None:
        """Prepares the evaluation."""
        self.prepare_evaluation()

    def on_validation_epoch_end(self) -> None:
        """Ends the evaluation."""
        self.finish_evaluation()

    def on_test_epoch_end(self) -> None:
        """Ends the evaluation."""
        self.finish_evaluation()

    def on_predict_epoch_end(self) -> None:
        """Ends the evaluation."""
        self.finish_evaluation()


def check_numbers(outputs: Tensor, source: object) -> None:
    """Refuse outputs that are not finite: no probability follows from them.

    Args:
        outputs: Probabilities, scores or losses.
        source: The adapter, for the message.

    Raises:
        UserError: One is infinite, or not a number.
    """
    if not outputs.isfinite().all():
        raise UserError(
            f"{source}: the outputs of the model are not finite, so that nothing follows from them. The weights or "
            "alpha of the adapter are too large: copy it again, or train it with a lower --model.learning_rate."
        )
