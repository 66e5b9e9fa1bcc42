"""Fine-tuning of CLIP against all classes, with learned prompts, a weight update, or both."""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from randlora_pl.adapters import Adapter, Frozen
from randlora_pl.models import clip_image_spec, load_clip
from randlora_pl.models.prompted import TextRows, is_causal, whole_rows
from randlora_pl.prompts import CoOp, PromptLearner, Prompts
from randlora_pl.tasks import images, losses, optim
from randlora_pl.tasks.base import AdaptationTask
from randlora_pl.tasks.losses import StepFeatures, all_captions, class_losses, pair_floor, pair_losses
from randlora_pl.tasks.prompt import combinations, features, saved, second_stage, tip
from randlora_pl.tasks.prompt.decoupled import Decoupled, DePT
from randlora_pl.tasks.prompt.regulation import SelfRegulation, Teacher
from randlora_pl.tasks.prompt.tip import Cache, TipAdapter
from randlora_pl.utils.options import Count, NotNegative, Positive, Probability


class PromptTask(AdaptationTask):
    """Fine-tunes a CLIP model by the cross-entropy over all classes, whose texts are encoded once per optimizer step.

    Prompts, weight update, second head and regulation are independent options. ``prompts=Fixed()`` with an adapter is
    the loss of CLIP-LoRA; learned prompts with the adapter `Frozen` are prompt tuning.

    Examples:
        >>> task = PromptTask("tiny", prompts=CoOp(length=4, words=None))
        >>> make_trainer().fit(task, ImageData(dataset="digits", steps=2))
    """

    zero_shot = runs_blocks = True
    to_train = "Learn prompts (--model.prompts CoOp), or add a weight update (--model.adapter RandLoRA)."
    setup, evaluate, predict_step = images.setup, images.evaluate, images.predict_step
    used_prompts, use_typed_prompts = saved.used_prompts, saved.use_typed_prompts
    frame = property(images.frame)

    name: str = field(default="tiny", kw_only=False)
    """An open_clip architecture, for example ``ViT-B-32``, or ``tiny`` (bundled)."""
    pretrained: str | None = field(default=None, kw_only=False)
    """A tag of open_clip, a weights file, or ``random``. Only ``tiny`` needs none: it is bundled with its weights."""
    adapter: Adapter = Frozen()
    """The weight update and its options."""
    prompts: PromptLearner = CoOp()
    """The prompt learner and its options."""
    head: DePT | TipAdapter | None = None
    """A second head: decoupled from the similarities, or a cache of training images."""
    regulation: SelfRegulation | None = None
    """What keeps learned prompts near the pretrained model."""
    targets: list[str] | None = None
    """Layers to adapt: regular expressions over layer names or the aliases ``qkv q k v kv o fc1 fc2 attn mlp all
    conv``, with an optional tower (``visual:mlp``). Default: packed q/k/v and both MLP matrices of both towers;
    convolutions and attention pool of a ResNet."""
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
    loss_batch: Literal["all", "joint"] = "all"
    """``all`` compares an image with all classes; ``joint`` with the captions of the batch of an optimizer step, as
    `VisionLanguageTask` does. All classes are encoded in both cases."""
    text_chunk_tokens: Count = 4096
    """Tokens of the texts that are alive at a time in a training step."""
    classifier_steps: Annotated[float, Probability] = 0.0
    """Share of the steps, at the end, that train a classifier alone: 0.4 is 2SFS. It starts from the class features;
    known classes are then predicted from it, other classes from the text tower."""

    def __post_init__(self) -> None:
        given = self.learning_rate
        super().__post_init__()
        combinations.check(self, given)
        self.head_learning_rate = combinations.head_rate(self, self.head_learning_rate)
        self.zero_shot = self.prompts.starts_pretrained and self.head is None
        self.image_spec = clip_image_spec(self.name, self.pretrained)
        self.pretrained = images.needed_weights(self.name, self.pretrained)
        self.learned: Prompts
        self.rows: TextRows | None = None
        self.decoupled: Decoupled | Cache | None = None
        self.teacher: Teacher | None = None
        self.classifier: nn.Parameter | None = None
        self.own_classes: list[str] = []
        self._step_features: StepFeatures | None = None
        self._class_features: Tensor | None = None
        self._constant_texts: Tensor | None = None
        self.saved_head = False

    # Building

    def build(self) -> nn.Module:
        """Load the CLIP model, and make the learned tokens from it."""
        clip = load_clip(self.name, self.pretrained, seed=self.seed)
        self.identity = clip.identity
        self._learn_on(clip.model, clip.tokenizer)
        return clip.model

    def configure_model(self) -> None:
        """Build the model (see `AdaptationTask`); refuse a method that a second stage would end."""
        super().configure_model()
        second_stage.check_procedure(self)

    def build_on(self, other: AdaptationTask) -> None:
        """Make the learned tokens for a model that another task has built."""
        self._learn_on(other.model, other.tokenizer)

    def _learn_on(self, model: nn.Module, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.own_classes = own = saved.classes_of(self.saved, self.classnames, self.prompts)
        self.learned = self.prompts.build(model, tokenizer, own, self.seed)
        self._take_rows(model, self.classnames)
        with torch.no_grad():
            width = model.encode_text(tokenizer(["x"]).to(next(model.parameters()).device)).shape[1]  # type: ignore[operator]
        self.register_buffer("class_head", torch.zeros(len(own), width), persistent=False)
        combinations.check_model(self, model)
        if isinstance(self.head, TipAdapter):
            self.decoupled = self.head.build(self, width, len(own))
        elif self.head is not None:
            self.decoupled = self.head.build(width, len(own), self.seed)
        if self.classifier_steps:
            self.classifier = nn.Parameter(torch.zeros(len(own), width))

    def _take_rows(self, model: nn.Module, classnames: list[str]) -> None:
        """Tokenize the texts of classes."""
        if is_causal(model):
            self.rows = self.learned.rows(classnames, self.text_chunk_tokens)
        else:  # of words alone, see `text_tower`
            template: str = self.learned.template  # type: ignore[assignment]
            tokens = whole_rows(self.tokenizer, classnames, template)
            self.register_buffer("tokens", tokens.to(self.device), persistent=False)

    def set_classes(self, classnames: list[str], templates: list[str], captions: bool = False) -> None:
        """Name the classes; after the training others, too, unless the prompts are of each class alone.

        Raises:
            UserError: There are fewer than two, or the prompts cannot name them.
        """
        if self.backbone is not None and list(classnames) != self.classnames:
            saved.check_classes(self.own_classes, classnames, self.prompts)
            self._take_rows(self.model, list(classnames))
            if self.rows is not None:
                self.rows.to(self.device)
            self._forget()
            self.classnames = list(classnames)
        images.set_classes(self, classnames, templates, captions)

    _texts, _images, _logits, _logits_by_image = features.texts, features.images, features.logits, features.by_image
    _step_texts, class_features, class_logits = features.step_texts, features.class_features, features.class_logits
    scale, features_of, percent_among = features.scale, features.features_of, features.percent_among

    prepare_evaluation, finish_evaluation = losses.prepare_evaluation, losses.finish_evaluation

    # Training

    def sample_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy over all classes, with the terms of the second head and of the regulation."""
        if second_stage.has_begun(self):
            return second_stage.sample_losses(self, batch)
        own = self._images(batch["image"])
        if self.prompts.per_image:
            return self._cross_entropy(self._logits_by_image(own), batch)
        texts = self._step_texts(batch)
        logits = self._logits(own, texts)
        if isinstance(self.decoupled, Cache):
            logits = self.decoupled.mixed(logits, own)
        found, right = self._cross_entropy(logits, batch)
        if isinstance(self.decoupled, Decoupled):
            found = self.decoupled.losses(found, own, texts, batch["label"])
        if self.regulation is not None:
            if self.teacher is None:
                self.teacher = self.regulation.build(self.model, self.tokenizer, self.classnames)
            found = found + self.teacher.image_losses(self, batch["image"], own, logits)
        return found, right

    def _cross_entropy(self, logits: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the losses (b,) of logits (b, C), and which of the likeliest classes are right."""
        if self.loss_batch == "all":
            return class_losses(logits, batch, 0.0)
        losses = pair_losses(self.model, logits, batch["label"], *self._captions(batch))
        return losses, logits.argmax(1) == batch["label"]

    def _captions(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return all classes and the number of their captions, counted once for the loss and its floor."""
        if "captions" not in batch:
            batch["captions"] = all_captions(batch, len(self.classnames))
        captions: tuple[Tensor, Tensor] = batch["captions"]
        return captions

    def loss_floor(self, batch: dict[str, Any]) -> Tensor | float:
        """Return the part of each loss that equal captions cause, if the loss is joint (see `pair_floor`)."""
        if self.loss_batch == "all" or second_stage.has_begun(self):
            return 0.0
        share = 1 - self.decoupled.weight if isinstance(self.decoupled, Decoupled) else 1.0
        return share * pair_floor(self.model, batch["label"], *self._captions(batch))

    def accumulated_loss(self, batch: dict[str, Any]) -> Tensor | None:
        """Return the text tower's gradient of earlier micro-batches, and the regulation's term of all classes."""
        held = self._step_features
        carried, other = losses.accumulated_loss(self, batch), second_stage.unused(self, batch)
        if carried is not None and self.teacher is not None and held is not None:
            carried = carried + self.teacher.text_loss(held.features) * self.trainer.accumulate_grad_batches
        return carried if other is None else other if carried is None else carried + other

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return the groups of the weight update, the prompts, the second head and the classifier."""
        groups = super().optimizer_groups()
        rate, decay = self.prompt_learning_rate, self.prompt_weight_decay
        groups += optim.parameter_groups(self.learned.parameters(), rate, decay, True)
        if self.head is not None and self.decoupled is not None:
            eps = {"eps": tip.EPS} if isinstance(self.decoupled, Cache) else {}
            own = optim.parameter_groups(self.decoupled.parameters(), self.head_learning_rate or 0.0, decay, True)
            groups += [group | eps for group in own]
        if self.classifier is not None:
            groups += optim.parameter_groups([self.classifier], self.head_learning_rate or 0.0, self.weight_decay, True)
        return groups

    rate_factors = second_stage.rate_factors

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Leave alone what does not train in this stage."""
        second_stage.drop_unused(self, optimizer)

    def on_train_start(self) -> None:
        """Drop the features of an interrupted run, and of a loaded file."""
        super().on_train_start()
        saved.check_own(self)
        self._step_features, self.saved_head, self.teacher = None, False, None
        second_stage.start(self)
        tip.start(self)
        self._forget()

    def _forget(self) -> None:
        """Drop class features that were encoded with other weights."""
        self._class_features = self._constant_texts = None

    # Files

    constructor, head_tensors, load_head, save = saved.constructor, saved.head_tensors, saved.load_head, saved.save
    use_sum, parameter_parts, rates, facts = saved.use_sum, saved.parameter_parts, saved.rates, saved.facts
    trained_state = saved.trained_state

    @classmethod
    def arguments(cls, saved_ones: Mapping[str, Any], source: object) -> dict[str, Any]:
        """Return arguments from a file, with learner, head and regulation as objects (see `saved.arguments`)."""
        return saved.arguments(saved_ones, source)
