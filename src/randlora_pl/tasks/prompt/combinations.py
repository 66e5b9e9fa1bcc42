"""Refusals of options of `PromptTask` that do not go together."""

from typing import Any

from torch import nn

from randlora_pl.adapters import Frozen, GaLore
from randlora_pl.prompts import Fixed
from randlora_pl.tasks.losses import logit_bias
from randlora_pl.tasks.prompt.tip import TipAdapter
from randlora_pl.utils.errors import UserError


def check(task: Any, learning_rate: float | None) -> None:
    """Refuse options that another one would ignore, or that need what another one changes.

    Args:
        task: The task.
        learning_rate: The rate that was given for its weight update.

    Raises:
        UserError: See above; the message has what to leave out.
    """
    adapter, prompts = task.adapter, task.prompts
    if task.regulation is not None and not adapter.keeps_base:
        raise UserError(f"{adapter.method()} trains the model that regulation needs. Leave one of them out.")
    if prompts.per_image and not (task.head is task.regulation is None):
        raise UserError(f"{prompts.method()} has other class features for each image: leave head and regulation out.")
    if isinstance(task.head, TipAdapter):
        others = isinstance(prompts, Fixed) and isinstance(adapter, Frozen) and task.regulation is None
        if not others or task.schedule != "cosine":
            raise UserError(
                "TipAdapter keeps features of the pretrained model: it needs --model.prompts Fixed, --model.adapter "
                "Frozen and --model.schedule cosine, without regulation."
            )
    if task.schedule == "epochs" and (task.warmup_steps, task.final_lr_fraction) != (0, 0.01):
        raise UserError(
            "the schedule of epochs has no warmup_steps or final_lr_fraction: leave them out, or use "
            "--model.schedule cosine."
        )
    if task.optimizer == "sgd" and isinstance(adapter, GaLore):
        raise UserError(f"{adapter.method()} has an optimizer of its own: use --model.optimizer adamw.")
    if task.optimizer == "sgd" and learning_rate is None and not isinstance(adapter, Frozen):
        raise UserError(
            f"SGD would train {adapter.method()} slowly at {task.learning_rate:g}, its rate for AdamW: add "
            "--model.optimizer adamw --model.schedule cosine, or give a --model.learning_rate for SGD."
        )
    if task.classifier_steps and (task.head is not None or prompts.per_image or task.schedule != "cosine"):
        raise UserError("classifier_steps needs --model.schedule cosine, and neither --model.head nor CoCoOp.")


def head_rate(task: Any, given: float | None) -> float | None:
    """Return the learning rate of a second head or a classifier; None if neither trains.

    Raises:
        UserError: The given rate has nothing to train.
    """
    if task.classifier_steps:
        return given or float(task.learning_rate)
    factor = 0.0 if task.head is None else task.head.rate_factor
    if given and not factor:
        raise UserError(
            f"--model.head_learning_rate is {given:g}, and no head trains. Add --model.head DePT or "
            "--model.classifier_steps 0.4, or leave it out."
        )
    return given or task.prompt_learning_rate * factor or None


def check_model(task: Any, model: nn.Module) -> None:
    """Refuse options that do not go with the model.

    Raises:
        UserError: The sigmoid loss would get logits for which the model's bias was not trained.
    """
    if isinstance(task.head, TipAdapter) and task.loss_batch == "joint" and logit_bias(model) is not None:
        raise UserError(
            f"TipAdapter adds to the similarities of {task.name}, whose sigmoid loss has a bias for them alone: use "
            "--model.loss_batch all."
        )
