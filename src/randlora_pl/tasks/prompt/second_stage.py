"""The second stage of 2SFS: the last steps train a classifier alone (Farina et al., arXiv 2503.11609).

Functions take a `PromptTask` as ``Any``, because it imports this module.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.tasks import optim
from randlora_pl.tasks.losses import class_losses, logit_bias, normalize
from randlora_pl.utils.errors import UserError


def check_procedure(task: Any) -> None:
    """Refuse a method that changes what trains during the training.

    Raises:
        UserError: It does, and the task has a second stage.
    """
    if task.classifier is not None and task.report.procedure is not None:
        raise UserError(f"classifier_steps ends the training of {task.adapter.method()}'s procedure; use LoRA.")


def start(task: Any) -> None:
    """Start with an empty classifier; the first step of the stage fills it."""
    if task.classifier is not None and task.trainer.global_step <= first_steps(task):
        nn.init.zeros_(task.classifier)


def first_steps(task: Any) -> int:
    """Return the optimizer steps of the first stage."""
    total, share = int(task.total_steps()), float(task.classifier_steps)
    return total - round(total * share)


def has_begun(task: Any) -> bool:
    """Return True if a training is in its second stage."""
    return task.classifier is not None and task._trainer is not None and task.trainer.global_step >= first_steps(task)


def rate_factors(task: Any, groups: Sequence[dict[str, Any]]) -> list[optim.Factor]:
    """Return the schedule of each group: with two stages a cosine in each, and 0 in the other stage.

    The last group is the classifier's. The optimizer first sees a gradient of it in its own stage, so that AdamW starts
    anew there.
    """
    if task.classifier is None:
        return optim.rate_factors(task, groups)
    total, first, final = task.total_steps(), first_steps(task), task.final_lr_fraction

    def stage(start: int, stop: int, warmup: int) -> optim.Factor:
        def factor(step: int) -> float:
            here = start <= step < stop
            return optim.schedule_factor(step - start, stop - start, warmup, final) if here else 0.0

        return factor

    return [stage(0, first, task.warmup_steps)] * (len(groups) - 1) + [stage(first, total, 0)]


def sample_losses(task: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of the classifier on features without dropout, and how far each image is right."""
    with _evaluating(task), torch.no_grad():
        if task.trainer.global_step == first_steps(task) and batch["micro_batch"] == 0:
            task.classifier.copy_(normalize(task._texts(task.model)))
        own = task._images(batch["image"])
    return class_losses(task._logits(own, task.classifier), batch, 0.0)


def places_of(task: Any) -> list[int] | None:
    """Return the place of each class among the classes of the training; None if one of them was not trained."""
    own: list[str] = task.own_classes
    if task.classnames == own:
        return list(range(len(own)))  # names may be equal
    places = {own[place]: place for place in reversed(range(len(own)))}
    return [places[name] for name in task.classnames] if set(task.classnames) <= places.keys() else None


def known(task: Any) -> Tensor:
    """Return the features (C, e) that a prediction compares with: a trained classifier's, or of all texts."""
    own: Tensor | None = task.classifier
    if own is not None and (places := places_of(task)) is not None and bool(own.any()):
        return own.detach()[places]
    texts: Tensor = task._texts(task.model)
    return texts


def scaled_features(task: Any) -> Tensor:
    """Return the features of all classes (C, e) as an adapter file has them: of unit length, times the scale."""
    found: Tensor = task.scale() * normalize(known(task))
    return found


def unused(task: Any, batch: dict[str, Any]) -> Tensor | None:
    """Return a term of value 0 with what does not train in this stage, as DDP waits for all gradients."""
    own: Tensor | None = task.classifier
    if batch["micro_batch"] < batch["micro_batches"] - 1:
        return None
    if has_begun(task):
        idle = [each for each in task.parameters() if each.requires_grad and each is not own]
    else:
        idle = _cancelled(task) if own is None else [own, *_cancelled(task)]
    return 0.0 * sum((each.sum() for each in idle[1:]), idle[0].sum()) if idle else None


def _cancelled(task: Any) -> list[Tensor]:
    """Return the logit bias if it is trainable: it cancels in a softmax over all classes."""
    bias = logit_bias(task.model)
    return [] if bias is None or task.loss_batch != "all" or not bias.requires_grad else [bias]


def drop_unused(task: Any, optimizer: Any) -> None:
    """Drop the gradients of what does not train in this stage, so that the optimizer leaves it alone."""
    for bias in _cancelled(task):
        bias.grad = None
    for group in optimizer.param_groups if task.classifier is not None else ():
        for each in group["params"] if group["lr"] == 0 else ():
            each.grad = None


@contextmanager
def _evaluating(task: Any) -> Iterator[None]:
    """Switch to evaluation, and back."""
    training = task.training
    task.eval()
    try:
        yield
    finally:
        task.train(training)
