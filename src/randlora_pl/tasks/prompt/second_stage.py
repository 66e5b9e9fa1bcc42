"""The second stage of 2SFS: the last steps train a classifier alone (Farina et al., arXiv 2503.11609)."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from randlora_pl.tasks.images import UsedPrompts
from randlora_pl.tasks.losses import class_losses, logit_bias, normalize
from randlora_pl.tasks.optim import Factor, schedule_factor
from randlora_pl.tasks.prompt.features import PromptedClip
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Probability


class TwoStages(PromptedClip):
    """Prompted CLIP model, whose last training steps may train a classifier alone.

    Attributes:
        classifier: (C, e), zero before its own stage; None without a second stage.
    """

    classifier_steps: Annotated[float, Probability] = 0.0
    """Share of the steps, at the end, that train a classifier alone: 0.4 is 2SFS. It starts from the class features;
    known classes are then predicted from it, other classes from the text tower."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.classifier: nn.Parameter | None = None

    def configure_model(self) -> None:
        """Build the model; refuse a method that changes what trains during the training, beside a second stage."""
        super().configure_model()
        if self.classifier is not None and self.report.procedure is not None:
            raise UserError(f"classifier_steps ends the training of {self.adapter.method()}'s procedure; use LoRA.")

    def on_train_start(self) -> None:
        """Start with an empty classifier; the first step of the stage fills it."""
        super().on_train_start()
        if self.classifier is not None and self.trainer.global_step <= self._first_steps():
            nn.init.zeros_(self.classifier)

    def _first_steps(self) -> int:
        """Return the optimizer steps of the first stage."""
        total = self.total_steps()
        return total - round(total * self.classifier_steps)

    def in_second_stage(self) -> bool:
        """Return True if a training is in its second stage."""
        trains = self.classifier is not None and self._trainer is not None
        return trains and self.trainer.global_step >= self._first_steps()

    def rate_factors(self, groups: Sequence[dict[str, Any]]) -> list[Factor]:
        """Return the schedule of each group: with two stages a cosine in each, and 0 in the other stage.

        The last group is the classifier's. The optimizer first sees a gradient of it in its own stage, so that AdamW
        starts again there.
        """
        if self.classifier is None:
            return super().rate_factors(groups)
        total, first, final = self.total_steps(), self._first_steps(), self.final_lr_fraction

        def stage(start: int, stop: int, warmup: int) -> Factor:
            def factor(step: int) -> float:
                here = start <= step < stop
                return schedule_factor(step - start, stop - start, warmup, final) if here else 0.0

            return factor

        return [stage(0, first, self.warmup_steps)] * (len(groups) - 1) + [stage(first, total, 0)]

    def classifier_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of the classifier on features without dropout, and how far each image is right."""
        assert self.classifier is not None
        training = self.training
        self.eval()
        with torch.no_grad():
            if self.trainer.global_step == self._first_steps() and batch["micro_batch"] == 0:
                self.classifier.copy_(normalize(self._texts(self.model)))
            own = self._images(batch["image"])
        self.train(training)
        return class_losses(self._logits(own, self.classifier), batch, 0.0)

    def scaled_features(self) -> Tensor:
        """Return the features (C, e) that a prediction compares with, of unit length, times the scale.

        A trained classifier has its own; else they are of all texts. An adapter file has them in this form.
        """
        own, places = self.classifier, self.places_of()
        if own is not None and places is not None and bool(own.any()):
            return self.scale() * normalize(own.detach()[places])
        return self.scale() * normalize(self._texts(self.model))

    def unused(self, batch: dict[str, Any]) -> Tensor | None:
        """Return a term of value 0 with what does not train in this stage, as DDP waits for all gradients."""
        own = self.classifier
        if batch["micro_batch"] < batch["micro_batches"] - 1:
            return None
        idle: list[Tensor]
        if self.in_second_stage():
            idle = [each for each in self.parameters() if each.requires_grad and each is not own]
        else:
            idle = self._cancelled() if own is None else [own, *self._cancelled()]
        return 0.0 * sum((each.sum() for each in idle[1:]), idle[0].sum()) if idle else None

    def _cancelled(self) -> list[Tensor]:
        """Return the logit bias if it is trainable: it cancels in a softmax over all classes."""
        bias = logit_bias(self.model)
        return [] if bias is None or self.loss_batch != "all" or not bias.requires_grad else [bias]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Drop the gradients of what does not train in this stage, so that the optimizer leaves it alone."""
        for bias in self._cancelled():
            bias.grad = None
        for group in optimizer.param_groups if self.classifier is not None else ():
            for each in group["params"] if group["lr"] == 0 else ():
                each.grad = None

    def used_prompts(self, templates: Sequence[str] | None = None) -> UsedPrompts:
        """Return the prompts of the task (see `PromptedClip`); a trained classifier has no words."""
        found = super().used_prompts(templates)
        if not found.training or not self.classifier_steps:
            return found
        return UsedPrompts(found.training, learned="classifier_steps")
