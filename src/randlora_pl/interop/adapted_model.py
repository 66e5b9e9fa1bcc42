"""Adapted models by name, from the Hub or from this machine."""

import os
from typing import Any

from randlora_pl.adapters.save_load import read_shared
from randlora_pl.language.tasks.common import plain_task as text_task
from randlora_pl.tasks.objective import Objective
from randlora_pl.tasks.restore import make_ready
from randlora_pl.tasks.restore import plain_task as image_task


class AdaptedModel:
    """Models with their adapters, ready to predict.

    Examples:
        >>> task = AdaptedModel.from_pretrained("runs/one/adapter")
        >>> task.class_logits(digits).shape
        torch.Size([2, 10])
    """

    @staticmethod
    def from_pretrained(name: str | os.PathLike[str], *, revision: str | None = None, **overrides: Any) -> Objective:
        """Build the base model of an adapter, check its weights, and load the adapter with its head.

        Args:
            name: Repository USER/NAME of the Hugging Face Hub, or an adapter folder or file, which comes first if both
                exist.
            revision: Branch, tag or commit of the repository.
            overrides: Arguments of the task to change, for example ``pretrained`` if a weights file moved.

        Returns:
            The task that saved the adapter, on the CPU in eval mode, with its adapter merged: ``class_logits(images)``
            of a task on images, ``write(texts)`` or ``classify(texts)`` of a language model. Its module is
            ``task.model``.

        Raises:
            UserError: The adapter is missing or damaged, no task saved it, or the base model has other weights.
        """
        file = read_shared(name, revision)
        of_texts = file.config.get("base_model", {}).get("library") == "transformers"
        return make_ready(text_task(file, **overrides) if of_texts else image_task(file, **overrides), file)
