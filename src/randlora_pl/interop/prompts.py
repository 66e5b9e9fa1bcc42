"""Refusals of uses that learned prompts do not allow, with what works instead."""

from randlora_pl.adapters import AdapterFile
from randlora_pl.prompts import CoOp, PromptLearner
from randlora_pl.tasks.prompt.decoupled import SecondHeadOptions
from randlora_pl.tasks.prompt.features import PromptedClip
from randlora_pl.tasks.restore import task_class
from randlora_pl.utils.errors import UserError


def parts_of(file: AdapterFile) -> tuple[PromptLearner, SecondHeadOptions | None, bool] | None:
    """Return the prompt learner and the second head that an adapter file has; None without a `PromptTask`.

    The third is True if a second stage has trained the head, which the texts do not give.

    Raises:
        UserError: One of them is unknown, or its options do not fit.
    """
    kind = task_class(file)
    if kind is None or not issubclass(kind, PromptedClip):
        return None
    made = kind.arguments(file.metadata.get("arguments", {}), file.path)
    return made.get("prompts", CoOp()), made.get("head"), bool(made.get("classifier_steps"))


def check_merge(file: AdapterFile, scale: float = 1.0) -> None:
    """Refuse to write weights for a bare library that would be another model.

    Raises:
        UserError: Prompts, second head or scale do not allow it; the message has what does.
    """
    parts = parts_of(file)
    if parts is None:
        return
    prompts, head, classifier = parts
    if prompts.per_image:
        why = f"{prompts.method()} has other class features for each image, so it has no head"
    elif prompts.visual:
        why = "visual prompts are inputs, no weight can hold them"
    else:
        why = "" if head is None else head.why_not_linear
    if why:
        ways = "predict and serve take the adapter"
        ways += "" if prompts.per_image else ", and adapter export --to onnx writes a program"
        raise UserError(f"{file.path} cannot be merged: {why}. {ways[0].upper()}{ways[1:]}.")
    if scale != 1 and (prompts.learns or classifier):
        what, verb = ("prompts", "were") if prompts.learns else ("classifier", "was")
        raise UserError(f"--scale is {scale:g}: the {what} of {file.path} {verb} learned for the whole update, 1.")


def check_no_prompts(file: AdapterFile, why: str) -> None:
    """Refuse an operation on the weight update alone, which is another model without the prompts.

    Args:
        file: The adapter.
        why: The reason, such as ``PEFT has no place for them``.

    Raises:
        UserError: Prompts or a second head were learned.
    """
    parts = parts_of(file)
    if parts is None:
        return
    prompts, head, classifier = parts
    what = prompts.method() if prompts.learns else "" if head is None else head.method()
    what = what or ("classifier_steps" if classifier else "")
    if what:
        raise UserError(f"{file.path} has learned prompts or another head ({what}): {why}.")
