"""Functions that `PromptTask` has as methods: features of its texts and images, and their logits."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.models.prompted import encode_rows, encode_words, image_features, text_tower
from randlora_pl.tasks.losses import normalize, shared_features, similarities
from randlora_pl.tasks.prompt.saved import check_classes
from randlora_pl.tasks.prompt.second_stage import places_of, scaled_features
from randlora_pl.utils.errors import UserError


def texts(task: Any, model: nn.Module, shift: Tensor | None = None, again: bool = False) -> Tensor:
    """Return the features (C, e) of all classes, not normalized.

    Args:
        task: The task.
        model: Its model, or the teacher's.
        shift: (d,), added to the context.
        again: Compute a single chunk again in the backward pass, too.
    """
    if task.rows is None:
        return encode_words(model, task.tokens, task.text_chunk_tokens)
    context = task.learned.context()
    if shift is not None and context is not None:
        context = context + shift
    return encode_rows(text_tower(model), task.rows, context, task.learned.deep(), again)


def images(task: Any, batch: Tensor) -> Tensor:
    """Return the features (b, e) of images, not normalized."""
    return image_features(task.model.visual, batch, task.learned.vision())


def scale(task: Any) -> Tensor:
    """Return the factor of the similarities, a scalar."""
    factor: Tensor = task.model.logit_scale.exp()
    return factor


def logits(task: Any, features: Tensor, classes: Tensor) -> Tensor:
    """Return scaled similarities (b, C) of image features and text features, neither normalized."""
    found: Tensor = task.scale() * similarities(normalize(features), normalize(classes))
    return found


def by_image(task: Any, features: Tensor) -> Tensor:
    """Return scaled similarities (b, C) of images, each with its own texts, of which one image's are alive."""
    shifts, again = task.learned.shifts(normalize(features)), len(features) > 1
    each = zip(features, shifts, strict=True)
    return torch.cat([logits(task, one[None], texts(task, task.model, shift, again)) for one, shift in each])


def trains_texts(task: Any) -> bool:
    """Return True if a text's features change in training."""
    weights = task.model.named_parameters()
    return task.learned.trains_texts() or any(
        each.requires_grad for name, each in weights if not name.startswith("visual.")
    )


def step_texts(task: Any, batch: dict[str, Any]) -> Tensor:
    """Return the class features of an optimizer step; those that no training changes are encoded once."""
    if not trains_texts(task):
        if task._constant_texts is None:
            with torch.no_grad():
                task._constant_texts = texts(task, task.model)
        found: Tensor = task._constant_texts
        return found
    return shared_features(task, batch, lambda: texts(task, task.model))


def class_features(task: Any) -> Tensor:
    """Return the features of all classes (C, e), of unit length, encoded at the first use in an evaluation."""
    if task._class_features is None and task.saved_head and task.classnames == task.own_classes:
        task._class_features = normalize(task.class_head)
    if task._class_features is None:
        with torch.no_grad():
            task._class_features = normalize(scaled_features(task))  # with the last bits of a file's
    found: Tensor = task._class_features
    return found


@contextmanager
def naming(task: Any, classnames: list[str]) -> Iterator[None]:
    """Have the texts of any classes; the task keeps its own.

    Raises:
        UserError: The prompts cannot name others, or a name is too long.
    """
    check_classes(task.own_classes, classnames, task.prompts)
    held = task.rows, getattr(task, "tokens", None), task.classnames, task._class_features
    task.classnames, task._class_features = classnames, None
    try:
        task._take_rows(task.model, classnames)
        if task.rows is not None:
            task.rows.to(task.device)
        with torch.no_grad():
            yield
    finally:
        task.rows, _, task.classnames, task._class_features = held
        if held[1] is not None:
            task.tokens = held[1]


def features_of(task: Any, classnames: list[str], templates: Sequence[str] = ()) -> Tensor:
    """Return the features (C, e) of any classes, of unit length, without templates.

    Raises:
        UserError: As `naming`; or each image has other class features.
    """
    if task.prompts.per_image:
        raise UserError(f"{task.prompts.method()} has other class features for each image.")
    with naming(task, classnames):
        return normalize(texts(task, task.model))


def percent_among(
    task: Any,
    classnames: list[str],
    batches: Iterable[tuple[Tensor, Tensor]],
    tick: Callable[[int], None] = lambda _: None,
) -> tuple[float, int]:
    """Return the accuracy in percent among any classes, with the second head if all are known, and the images.

    Args:
        task: Task.
        classnames: C names.
        batches: Images (b, 3, H, W) with labels (b,).
        tick: Receives the number of images of each batch.
    """
    right = count = 0
    with naming(task, classnames):
        for batch, labels in batches:
            right += int((class_logits(task, batch).argmax(1) == labels).sum())
            count += len(labels)
            tick(len(labels))
    return 100 * right / max(1, count), count


def class_logits(task: Any, inputs: Any) -> Tensor:
    """Return logits (b, C): scaled similarities, mixed with the second head's for classes of its training."""
    own = images(task, inputs)
    if task.prompts.per_image:
        return by_image(task, own)
    found: Tensor = task.scale() * similarities(normalize(own), task.class_features())
    if task.decoupled is None or (places := places_of(task)) is None:
        return found
    whole = found.new_zeros(len(found), len(task.own_classes))
    whole[:, places] = found
    mixed: Tensor = task.decoupled.mixed(whole, own)
    return mixed[:, places]
