"""Fine-tuning of CLIP against all classes, with learned prompts, a weight update, or both."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from randlora_pl import prompts as learners
from randlora_pl.adapters import Adapter, Frozen, adapted_layers
from randlora_pl.adapters.described import Described, make
from randlora_pl.models import ImageTower, load_tokenizer
from randlora_pl.models.text import Tokenizer
from randlora_pl.prompts import Fixed, PromptLearner
from randlora_pl.tasks.images import ImageTask, normalize, similarities
from randlora_pl.tasks.losses import class_losses
from randlora_pl.tasks.optim import parameter_groups
from randlora_pl.tasks.prompt.features import PromptedClip
from randlora_pl.tasks.prompt.parts import DePT, SelfRegulation, Teacher, TipAdapter
from randlora_pl.tasks.vision_language import logit_bias, pair_floor, pair_losses
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import NotNegative, Positive
from randlora_pl.utils.run_files import flat

_LEARNERS = {name: getattr(learners, name) for name in learners.__all__}
PARTS: dict[str, dict[str, type[Described]]] = {
    "prompts": {
        name: kind for name, kind in _LEARNERS.items() if issubclass(kind, PromptLearner) and kind is not PromptLearner
    },
    "head": {"DePT": DePT, "TipAdapter": TipAdapter},
    "regulation": {"SelfRegulation": SelfRegulation},
}
"""Options of `PromptTask` that are objects, and their classes by name."""

_RECORDED = ("prompt_learning_rate", "prompt_weight_decay", "optimizer", "schedule", "loss_batch", "classifier_steps")


class PromptTask(PromptedClip):
    """Fine-tunes a CLIP model by the cross-entropy over all classes, whose texts are encoded once per optimizer step.

    Prompts, weight update, second head and regulation are independent options. ``prompts=Fixed()`` with an adapter is
    the loss of CLIP-LoRA; learned prompts with the adapter `Frozen` are prompt tuning.

    Examples:
        >>> task = PromptTask("tiny", prompts=CoOp(length=4, words=None))
        >>> make_trainer().fit(AdaptationModule(task), ImageData(dataset="digits", steps=2))
    """

    to_train = "Learn prompts (--model.prompts CoOp), or add a weight update (--model.adapter RandLoRA)."

    adapter: Adapter = Frozen()
    """The weight update and its options."""
    head: DePT | TipAdapter | None = None
    """A second head: decoupled from the similarities, or a cache of training images."""
    regulation: SelfRegulation | None = None
    """What keeps learned prompts near the pretrained model."""
    prompt_learning_rate: Annotated[float, Positive] = 2e-3
    """Peak learning rate of the prompts."""
    prompt_weight_decay: Annotated[float, NotNegative] = 0.0
    """Decay of the prompts."""
    head_learning_rate: Annotated[float, Positive] | None = None
    """Peak learning rate of the second head, or of the classifier of ``classifier_steps``. Default: the head's
    ``rate_factor`` times the prompts' rate, or ``learning_rate`` for the classifier."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """``adamw``, or ``sgd`` with momentum 0.9, as in the papers on prompts."""
    schedule: Literal["cosine", "epochs"] = "cosine"
    """``cosine`` per optimizer step, or ``epochs``: 1e-5 in the first epoch, then a cosine per epoch."""

    def __post_init__(self) -> None:
        given = self.learning_rate
        super().__post_init__()
        self._check_options(given)
        factor = 0.0 if self.head is None else self.head.rate_factor
        if self.classifier_steps:
            self.head_learning_rate = self.head_learning_rate or self.learning_rate
        elif self.head_learning_rate and not factor:
            raise UserError(
                f"--model.head_learning_rate is {self.head_learning_rate:g}, and no head trains. Add --model.head DePT "
                "or --model.classifier_steps 0.4, or leave it out."
            )
        else:
            self.head_learning_rate = self.head_learning_rate or self.prompt_learning_rate * factor or None
        self.zero_shot = self.prompts.starts_pretrained and self.head is None
        self.teacher: Teacher | None = None
        self.saved_head = False

    def _check_options(self, learning_rate: float | None) -> None:
        """Refuse options that another one would ignore or change; ``learning_rate`` was given for the weight update."""
        adapter, prompts = self.adapter, self.prompts
        if self.regulation is not None and not adapter.keeps_base:
            raise UserError(f"{adapter.method()} trains the model that regulation needs. Leave one of them out.")
        if prompts.per_image and (self.head is not None or self.regulation is not None):
            raise UserError(
                f"{prompts.method()} has other class features for each image: leave head and regulation out."
            )
        if isinstance(self.head, TipAdapter):
            others = isinstance(prompts, Fixed) and not adapter.updates and self.regulation is None
            if not others or self.schedule != "cosine":
                raise UserError(
                    "TipAdapter keeps features of the pretrained model: it needs --model.prompts Fixed, "
                    "--model.adapter Frozen and --model.schedule cosine, without regulation."
                )
        if self.schedule == "epochs" and (self.warmup_steps, self.final_lr_fraction) != (0, 0.01):
            raise UserError(
                "the schedule of epochs has no warmup_steps or final_lr_fraction: leave them out, or use "
                "--model.schedule cosine."
            )
        if self.optimizer == "sgd" and adapter.own_optimizer:
            raise UserError(f"{adapter.method()} has an optimizer of its own: use --model.optimizer adamw.")
        if self.optimizer == "sgd" and learning_rate is None and adapter.updates:
            raise UserError(
                f"SGD would train {adapter.method()} slowly at {self.learning_rate:g}, its rate for AdamW: add "
                "--model.optimizer adamw --model.schedule cosine, or give a --model.learning_rate for SGD."
            )
        if self.classifier_steps and (self.head is not None or prompts.per_image or self.schedule != "cosine"):
            raise UserError("classifier_steps needs --model.schedule cosine, and neither --model.head nor CoCoOp.")

    def take_texts(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        """Make the learned tokens, the second head and the classifier.

        Raises:
            UserError: The sigmoid loss would get logits for which the model's bias was not trained.
        """
        super().take_texts(model, tokenizer)
        classes = len(self.own_classes)
        with torch.no_grad():
            width = model.encode_text(tokenizer(["x"]).to(next(model.parameters()).device)).shape[1]  # type: ignore[operator]
        self.register_buffer("class_head", torch.zeros(classes, width), persistent=False)
        if isinstance(self.head, TipAdapter) and self.loss_batch == "joint" and logit_bias(model) is not None:
            raise UserError(
                f"TipAdapter adds to the similarities of {self.name}, whose sigmoid loss has a bias for them alone: "
                "use --model.loss_batch all."
            )
        if self.head is not None:
            self.decoupled = self.head.build(self, width)
        if self.classifier_steps:
            self.classifier = nn.Parameter(torch.zeros(classes, width))

    @property
    def shares_features(self) -> bool:
        """True if no learned tokens are in the image tower, and no texts depend on an image."""
        return not (self.prompts.visual or self.prompts.per_image)

    # Training

    def sample_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy over all classes, with the terms of the second head and of the regulation."""
        if self.in_second_stage():
            return self.classifier_losses(batch)
        own = self.noted(self._images(batch["image"]))
        if self.prompts.per_image:
            return self._cross_entropy(self._logits_by_image(own), batch)
        texts, head = self._step_texts(batch), self.decoupled
        logits = self._logits(own, texts)
        if head is not None:
            logits = head.training_logits(logits, own)
        losses, right = self._cross_entropy(logits, batch)
        if head is not None:
            losses = head.losses(losses, own, texts, batch["label"])
        if self.regulation is not None:
            if self.teacher is None:
                self.teacher = self.regulation.build(self.model, self.tokenizer, self.classnames)
            losses = losses + self.teacher.image_losses(self.model, batch["image"], own, logits, self.scale())
        return losses, right

    def _cross_entropy(self, logits: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the losses (b,) of logits (b, C), and which of the likeliest classes are right."""
        if self.loss_batch == "all":
            return class_losses(logits, batch, 0.0)
        losses = pair_losses(self.model, logits, batch["label"], *self._captions(batch))
        return losses, logits.argmax(1) == batch["label"]

    def _captions(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return all classes and the number of their captions, counted once for the loss and its floor."""
        if "captions" not in batch:
            count, present = len(self.classnames), batch["step_counts"]
            counts = present.new_zeros(count).scatter(0, batch["step_classes"], present)
            batch["captions"] = torch.arange(count, device=counts.device), counts
        captions: tuple[Tensor, Tensor] = batch["captions"]
        return captions

    def loss_floor(self, batch: dict[str, Any]) -> Tensor | float:
        """Return the part of each loss that equal captions cause, if the loss is joint (see `pair_floor`)."""
        if self.loss_batch == "all" or self.in_second_stage():
            return 0.0
        share = 1.0 if self.decoupled is None else self.decoupled.share
        return share * pair_floor(self.model, batch["label"], *self._captions(batch))

    def accumulated_loss(self, batch: dict[str, Any]) -> Tensor | None:
        """Return the text tower's gradient of earlier micro-batches, and the regulation's term of all classes."""
        held = self.step_features
        carried, other = super().accumulated_loss(batch), self.unused(batch)
        last = self.step_features is None
        if carried is not None and self.teacher is not None and held is not None and last:
            carried = carried + self.teacher.text_loss(held.features) * self.run.micro_batches()
        return carried if other is None else other if carried is None else carried + other

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return the groups of the weight update, the prompts, the second head and the classifier."""
        groups = super().optimizer_groups()
        rate, decay, own_rate = self.prompt_learning_rate, self.prompt_weight_decay, self.head_learning_rate or 0.0
        groups += parameter_groups(self.learned.parameters(), rate, decay, True)
        if self.decoupled is not None:
            eps = {} if self.decoupled.eps is None else {"eps": self.decoupled.eps}
            own = parameter_groups(self.decoupled.parameters(), own_rate, decay, True)
            groups += [group | eps for group in own]
        if self.classifier is not None:
            groups += parameter_groups([self.classifier], own_rate, self.weight_decay, True)
        return groups

    def start_training(self) -> None:
        """Drop the features of a loaded file, and fill the second head."""
        super().start_training()
        self._check_own()
        self.saved_head, self.teacher = False, None
        if self.decoupled is not None:
            texts = cache(lambda: self._texts(self.model))
            self.decoupled.start(self, self._images, lambda features: self._logits(features, texts()))

    # Evaluation

    def class_features(self) -> Tensor:
        """Return the features of all classes (C, e), of unit length, encoded at the first use in an evaluation."""
        if self._class_features is None and self.saved_head and self.classnames == self.own_classes:
            self._class_features = normalize(self.class_head)
        if self._class_features is None:
            with torch.no_grad():
                self._class_features = normalize(self.scaled_features())  # with the last bits of a file's
        return self._class_features

    def class_logits(self, inputs: Any) -> Tensor:
        """Return logits (b, C): scaled similarities, mixed with the second head's for classes of its training."""
        own = self._images(inputs)
        if self.prompts.per_image:
            return self._logits_by_image(own)
        logits = self.scale() * similarities(normalize(own), self.class_features())
        if self.decoupled is None or (places := self.places_of()) is None:
            return logits
        whole = logits.new_zeros(len(logits), len(self.own_classes))
        whole[:, places] = logits
        return self.decoupled.mixed(whole, own)[:, places]

    # Files and exports

    def check_part(self, part: str) -> None:
        """Refuse a part of a model that would be another model without its learned prompts or classifier."""
        prompts = self.prompts
        if part == "classifier" and prompts.per_image:
            raise UserError(
                f"{prompts.method()} encodes the classes again for each image, so no program has them as weights. Use "
                "predict or serve, or --part image."
            )
        if part == "text" and prompts.learns:
            raise UserError(
                f"the text tower alone is not what {prompts.method()} trained: it learned tokens, not words. Use "
                "--part classifier or image."
            )
        if part == "text" and self.classifier is not None:
            raise UserError(
                "a trained classifier predicts the classes (classifier_steps), so the texts alone are another model. "
                "Use --part classifier or image."
            )

    def image_tower(self) -> nn.Module:
        """Return the image tower, with its learned tokens as constants."""
        return ImageTower(self.model, self.learned.vision())

    def described_parts(self) -> dict[str, Any]:
        """Return the prompt learner and the second head as JSON values."""
        return {"prompt_learner": self.prompts.describe(), "head": self.head and self.head.describe()}

    def constructor(self) -> dict[str, Any]:
        """Return the constructor's arguments as JSON values, without the rate of a head."""
        values = super().constructor()
        values.pop("head_learning_rate", None)  # a subclass may fix it
        return {name: value.describe() if isinstance(value, Described) else value for name, value in values.items()}

    @classmethod
    def arguments(cls, saved: Mapping[str, Any], source: object) -> dict[str, Any]:
        """Return arguments from a file, with learner, head and regulation as objects.

        Raises:
            UserError: One of them is unknown, or its options do not fit.
        """
        parts = {name: make(PARTS[name], saved[name], source) for name in PARTS if saved.get(name) is not None}
        return {**saved, **parts}

    def head_tensors(self) -> dict[str, Tensor]:
        """Return the features of the classes, the learned tokens and the second head, by the names of the file."""
        tensors = {} if self.prompts.per_image else {"head": self.class_head}
        tensors |= {f"prompts.{name}": value for name, value in self.learned.named_parameters()}
        if self.decoupled is not None:
            tensors |= {f"decoupled.{name}": value for name, value in self.decoupled.state_dict().items()}
        return tensors

    def load_head(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors of `head_tensors` back from an adapter folder; the texts need no encoding then."""
        super().load_head(tensors)
        if self.classifier is not None:
            self.classifier.data = normalize(self.class_head)
        self.saved_head = not self.prompts.per_image

    def save(self, folder: str | Path, summary: Mapping[str, Any] | None = None) -> Path:
        """Write the adapter folder (see `Objective.save`), with the class features that an evaluation would have."""
        self._check_own()
        if not self.prompts.per_image:
            training, half = self.training, any(each.dtype == torch.bfloat16 for each in self.model.parameters())
            merged = any(layer.merged for layer in adapted_layers(self.model).values())
            self.eval()
            self.prepare_evaluation()
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=half):  # as in the training
                self.class_head = self.scaled_features()
            if not merged:
                self.finish_evaluation()
            self.train(training)
        return super().save(folder, summary)

    def _check_own(self) -> None:
        """Refuse to train or to save a second head or a classifier with other classes than its own."""
        if self.classnames != self.own_classes and (self.decoupled is not None or self.classifier is not None):
            own, now = self.own_classes[:3], self.classnames[:3]
            raise UserError(f"the second head is for the classes {own}..., not for {now}...: create a new task.")

    def trained_state(self) -> dict[str, Tensor]:
        """Return what trains, and what the second head has chosen."""
        chosen = {} if self.decoupled is None else self.decoupled.chosen()
        return super().trained_state() | {f"decoupled.{name}": value for name, value in chosen.items()}

    def use_sum(self, others: Mapping[str, ImageTask], name: str) -> None:
        """Encode the classes again; refuse a task that has learned other prompts."""
        own = self._learned()
        for theirs, other in others.items():
            assert isinstance(other, PromptTask)
            there = other._learned()
            equal = self.prompts.describe() == other.prompts.describe() and own.keys() == there.keys()
            if not equal or any(not torch.equal(value, there[key]) for key, value in own.items()):
                raise UserError(
                    f"{name} and {theirs} have different prompts or second heads, so a sum has none. Remove the "
                    "weights to predict with each."
                )
        self.saved_head = False

    def _learned(self) -> dict[str, Tensor]:
        tensors = self.head_tensors()
        return {key: value for key, value in tensors.items() if key != "head" or self.classifier is not None}

    def beside_on_meta(self, backbone: nn.Module) -> tuple[int, bool]:
        """Return the numbers of the prompts, counted for one class, and if there is a second head or a classifier."""
        head = self.head is not None or self.classifier_steps > 0
        if not self.prompts.learns:
            return 0, head
        made = self.prompts.build(backbone, load_tokenizer(self.name), ["x"], 0)
        return sum(parameter.numel() for parameter in made.parameters()), head

    def parameter_parts(self) -> dict[str, int]:
        """Return the numbers that train, by part: adapter, prompts, head; keys of the rate 0 are none."""
        parts = {"prompts": self.learned, "head": self.decoupled if self.head and self.head.rate_factor else None}
        counts = {
            key: sum(each.numel() for each in part.parameters()) for key, part in parts.items() if part is not None
        }
        counts["classifier"] = 0 if self.classifier is None else self.classifier.numel()
        return {"adapter": self.report.trainable, **{name: count for name, count in counts.items() if count}}

    def parts(self) -> list[Described]:
        """Return the prompt learner, the second head and the regulation."""
        return [part for name in PARTS if (part := getattr(self, name)) is not None]

    def rates(self) -> Mapping[str, float | None]:
        """Return the learning rates of prompts and second head by name."""
        rates = {"prompts": self.prompt_learning_rate} if self.prompts.learns else {}
        name = "head" if self.head is not None else "classifier"
        return rates | ({} if self.head_learning_rate is None else {name: self.head_learning_rate})

    def facts(self) -> dict[str, Any]:
        """Return prompts, head and regulation with their options under flat keys, for ``results.json``."""
        facts: dict[str, Any] = {}
        for name in PARTS:
            if (part := getattr(self, name)) is not None:
                facts |= flat(name, {"method": part.method(), **part.options()})
        counts = self.parameter_parts()
        if self.decoupled is not None:
            for values in self.decoupled.chosen().values():
                facts |= dict(zip(("cache_alpha", "cache_beta"), values.tolist(), strict=True))
        return facts | {
            "trainable_parameters": sum(counts.values()),
            "prompt_parameters": counts.get("prompts", 0),
            **{name: getattr(self, name) for name in _RECORDED},
        }
