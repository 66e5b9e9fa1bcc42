"""CLIP with learned prompts: its features and logits, and a second stage of the training, 2SFS (arXiv 2503.11609)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from randlora_pl.models.text import Tokenizer, image_features
from randlora_pl.prompts import CoOp, Fixed, PromptLearner
from randlora_pl.tasks.images import ClipTask, UsedPrompts, normalize, similarities
from randlora_pl.tasks.losses import class_losses
from randlora_pl.tasks.optim import Factor, schedule_factor
from randlora_pl.tasks.vision_language import logit_bias
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Count, Probability


class PromptedClip(ClipTask):
    """CLIP model whose texts and images have learned prompts; all classes are encoded.

    Attributes:
        classifier: (C, e), trained alone in the last steps, and zero before them; None without a second stage.
    """

    runs_blocks = names_others = True
    from_lora = False

    prompts: PromptLearner = CoOp()
    """The prompt learner and its options."""
    loss_batch: Literal["all", "joint"] = "all"
    """``all`` compares an image with all classes; ``joint`` with the captions of the batch of an optimizer step, as
    `VisionLanguageTask` does. All classes are encoded in both cases."""
    text_chunk_tokens: Count = 4096
    """Tokens of the texts that are alive at a time in a training step."""
    classifier_steps: Annotated[float, Probability] = 0.0
    """Share of the steps, at the end, that train a classifier alone: 0.4 is 2SFS. It starts from the class features;
    known classes are then predicted from it, other classes from the text tower."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.own_classes: list[str] = []
        self._constant_texts: Tensor | None = None
        self.classifier: nn.Parameter | None = None

    @property
    def trained_classes(self) -> list[str]:
        """Classes of the training; learned prompts name others, too."""
        return self.own_classes

    def take_texts(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        """Make the learned tokens, and tokenize the texts of all classes."""
        self.tokenizer = tokenizer
        trained = [] if self.saved is None else self.saved.metadata.get("classnames") or []
        self.own_classes = list(trained or self.classnames)
        check_classes(self.own_classes, self.classnames, self.prompts)
        self.learned = self.prompts.build(model, tokenizer, self.own_classes, self.seed)
        self._take_classes(model, self.classnames)

    def _take_classes(self, model: nn.Module, classnames: list[str]) -> None:
        self.learned.take_classes(model, classnames, self.text_chunk_tokens, self.device)

    def set_classes(
        self, classnames: list[str], templates: list[str], captions: bool = False, several: bool = False
    ) -> None:
        """Name the classes; after the training others, too, unless the prompts are of each class alone.

        Raises:
            UserError: There are fewer than two, or the prompts cannot describe them.
        """
        if self.backbone is not None and list(classnames) != self.classnames:
            check_classes(self.own_classes, classnames, self.prompts)
            self._take_classes(self.model, list(classnames))
            self.forget()
            self.classnames = list(classnames)
        super().set_classes(classnames, templates, captions, several)

    def used_prompts(self, templates: Sequence[str] | None = None) -> UsedPrompts:
        """Return the prompts of a task, whatever the templates: the words of `Fixed`; a trained classifier has none."""
        if not isinstance(self.prompts, Fixed):
            return UsedPrompts(learned=self.prompts.method())
        own = [self.prompts.template]
        return UsedPrompts(own, learned="classifier_steps") if self.classifier_steps else UsedPrompts(own, own)

    def use_typed_prompts(self) -> None:
        """Refuse them: the prompts are an option of the task.

        Raises:
            UserError: Always.
        """
        option = "words" if self.prompts.learns else "template"
        raise UserError(
            f"--data.templates: PromptTask has prompts of its own. Set --model.prompts.{option} instead, or use "
            "--model VisionLanguageTask."
        )

    def forget(self) -> None:
        """Drop class features that were encoded with other weights."""
        super().forget()
        self._constant_texts = None

    def _texts(self, model: nn.Module) -> Tensor:
        """Return the features (C, e) of all classes, not normalized."""
        return self.learned.encode_texts(model)

    def _images(self, batch: Tensor) -> Tensor:
        """Return the features (b, e) of images, not normalized."""
        return image_features(self.model.visual, batch, self.learned.vision())

    def _logits(self, features: Tensor, classes: Tensor) -> Tensor:
        """Return scaled similarities (b, C) of image features and text features, neither normalized."""
        return self.scale() * similarities(normalize(features), normalize(classes))

    def _logits_by_image(self, features: Tensor) -> Tensor:
        """Return scaled similarities (b, C) of images, each with its own texts, of which one image's are alive."""
        shifts, again = self.learned.shifts(normalize(features)), len(features) > 1
        assert shifts is not None
        pairs = zip(features, shifts, strict=True)
        return torch.cat(
            [self._logits(one[None], self.learned.encode_texts(self.model, shift, again)) for one, shift in pairs]
        )

    def _step_texts(self, batch: dict[str, Any]) -> Tensor:
        """Return the class features of an optimizer step; those that no training changes are encoded once."""
        weights = self.model.named_parameters()
        learned = self.learned.context() is not None or self.learned.deep()
        if learned or any(each.requires_grad for name, each in weights if not name.startswith("visual.")):
            return self.shared_features(batch, lambda: self._texts(self.model))
        if self._constant_texts is None:
            with torch.no_grad():
                self._constant_texts = self._texts(self.model)
        return self._constant_texts

    def places_of(self) -> list[int] | None:
        """Return the place of each class among the classes of the training; None if one of them was not trained."""
        own = self.own_classes
        if self.classnames == own:
            return list(range(len(own)))  # names may be equal
        places = {own[place]: place for place in reversed(range(len(own)))}
        return [places[name] for name in self.classnames] if set(self.classnames) <= places.keys() else None

    @contextmanager
    def naming(self, classnames: list[str]) -> Iterator[None]:
        """Have the texts of any classes; the task keeps its own.

        Raises:
            UserError: The prompts cannot describe others, or a name is too long.
        """
        check_classes(self.own_classes, classnames, self.prompts)
        held, features = self.classnames, self._class_features
        self.classnames, self._class_features = classnames, None
        try:
            self._take_classes(self.model, classnames)
            with torch.no_grad():
                yield
        finally:
            self.classnames, self._class_features = held, features
            self._take_classes(self.model, held)

    def features_of(self, classnames: list[str], templates: Sequence[str] = ()) -> Tensor:
        """Return the features (C, e) of any classes, of unit length, without templates.

        Raises:
            UserError: As `naming`; or each image has other class features.
        """
        if self.prompts.per_image:
            raise UserError(f"{self.prompts.method()} has other class features for each image.")
        with self.naming(classnames):
            return normalize(self._texts(self.model))

    def percent_among(
        self,
        classnames: list[str],
        batches: Iterable[tuple[Tensor, Tensor]],
        tick: Callable[[int], None] = lambda _: None,
        templates: Sequence[str] = (),
    ) -> tuple[float, int]:
        """Return the accuracy in percent among any classes, with the second head if all are known, and the images."""
        right = count = 0
        with self.naming(classnames):
            for batch, labels in batches:
                right += int((self.class_logits(batch).argmax(1) == labels).sum())
                count += len(labels)
                tick(len(labels))
        return 100 * right / max(1, count), count

    # The second stage, which trains a classifier alone (Farina et al.)

    def adapt(self) -> None:
        """Build the model; refuse a method that changes what trains during the training, with a second stage."""
        super().adapt()
        if self.classifier is not None and self.report.procedure is not None:
            raise UserError(f"classifier_steps ends the training of {self.adapter.method()}'s procedure; use LoRA.")

    def start_training(self) -> None:
        """Start with an empty classifier; the first step of the stage fills it."""
        super().start_training()
        if self.classifier is not None and self.run.step() <= self._first_steps():
            nn.init.zeros_(self.classifier)

    def _first_steps(self) -> int:
        """Return the optimizer steps of the first stage."""
        total = self.run.total_steps()
        return total - round(total * self.classifier_steps)

    def in_second_stage(self) -> bool:
        """Return True if a run is in its second stage."""
        trains = self.classifier is not None and self.run.total_steps() > 0
        return trains and self.run.step() >= self._first_steps()

    def rate_factors(self, groups: Sequence[dict[str, Any]]) -> list[Factor]:
        """Return the schedule of each group: with two stages a cosine in each, and 0 in the other stage.

        The last group is the classifier's. The optimizer first sees a gradient of it in its own stage, so that AdamW
        starts again there.
        """
        if self.classifier is None:
            return super().rate_factors(groups)
        total, first, final = self.run.total_steps(), self._first_steps(), self.final_lr_fraction

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
        try:
            with torch.no_grad():
                if self.run.step() == self._first_steps() and batch["micro_batch"] == 0:
                    self.classifier.copy_(normalize(self._texts(self.model)))
                own = self._images(batch["image"])
        finally:
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

    def before_step(self, groups: Sequence[dict[str, Any]]) -> None:
        """Drop the gradients of what does not train in this stage, so that the optimizer leaves it alone."""
        for bias in self._cancelled():
            bias.grad = None
        for group in groups if self.classifier is not None else ():
            for each in group["params"] if group["lr"] == 0 else ():
                each.grad = None


def check_classes(own: list[str], classnames: list[str], prompts: PromptLearner) -> None:
    """Refuse other classes than those that prompts were learned for, if each class has its own."""
    if prompts.class_specific and own != list(classnames):
        raise UserError(
            f"class-specific prompts were learned for {own[:3]}..., the data has {list(classnames)[:3]}.... Train with "
            "--model.prompts.class_specific false to predict others."
        )
